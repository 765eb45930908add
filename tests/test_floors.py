"""The shape of the package: imports point down, foreign engines are fenced, nothing grows without end.

Each rule is a function from parsed modules to sentences about what breaks it; planted mistakes show that it can speak.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatrain"

FLOORS = [
    {"base"},
    {"config", "parallel", "audit", "cluster", "report"},
    {"nn"},
    {"models", "data", "optim"},
    {"engine", "checkpoint"},
    {"generate", "convert", "plan"},
    {"evaluate"},
    {"train"},
    {"sweep"},
    {"cli"},
]
FLOOR_OF = {folder: number for number, folders in enumerate(FLOORS) for folder in folders}

FENCED = ("deepspeed", "wandb", "torch.distributed.pipelining")
LONGEST_FILE, LONGEST_FUNCTION = 850, 100

Modules = dict[str, ast.Module]
"""Parsed modules by path below the package, such as "nn/norm/rms.py"."""


def imports(module: ast.Module, path: str) -> Iterator[tuple[str, int]]:
    """Every imported name, dotted, with its line; those inside functions and under TYPE_CHECKING too."""
    here = ["megatrain", *Path(path).with_suffix("").parts]
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) - node.level] if node.level else []
            origin = [*above, node.module] if node.module else above
            yield from ((".".join([*origin, alias.name]), node.lineno) for alias in node.names)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


# ------------------------------------------------------------------------------------------------ the rules


def unknown_folders(modules: Modules) -> list[str]:
    folders = {Path(path).parts[0] for path in modules if "/" in path}
    return [f"megatrain/{folder} stands on no floor" for folder in sorted(folders - set(FLOOR_OF))]


def imports_that_point_up(modules: Modules) -> list[str]:
    found = []
    for path, module in modules.items():
        folder = Path(path).parts[0] if "/" in path else None
        for name, line in imports(module, path):
            parts = name.split(".")
            target = parts[1] if parts[0] == "megatrain" and len(parts) > 1 else None
            if folder not in FLOOR_OF or target not in FLOOR_OF or target == folder:
                continue
            if FLOOR_OF[target] >= FLOOR_OF[folder]:
                found.append(
                    f"{path}:{line} ({folder}, floor {FLOOR_OF[folder]}) imports {name} (floor {FLOOR_OF[target]})"
                )
    return found


def import_cycles(modules: Modules) -> list[str]:
    """Modules that import each other, within a folder too."""
    names = {
        "megatrain." + path.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): path for path in modules
    }
    edges: dict[str, set[str]] = {}
    for path, module in modules.items():
        targets = set()
        for name, _ in imports(module, path):
            found = names.get(name) or names.get(name.rpartition(".")[0])
            if found and found != path:
                targets.add(found)
        edges[path] = targets
    done: set[str] = set()
    cycles = []

    def visit(path: str, trail: list[str]) -> None:
        if path in trail:
            cycles.append(" -> ".join([*trail[trail.index(path) :], path]))
        elif path not in done:
            for target in sorted(edges[path]):
                visit(target, [*trail, path])
            done.add(path)

    for path in sorted(edges):
        visit(path, [])
    return cycles


def reexports(modules: Modules) -> list[str]:
    """An __init__.py holds a docstring and what its own registry needs, but no name to pass on."""
    found = []
    for path, module in modules.items():
        if Path(path).name != "__init__.py" or path == "__init__.py":
            continue
        used = {node.id for node in ast.walk(module) if isinstance(node, ast.Name)}
        for node in module.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.asname or alias.name.split(".")[0] for alias in node.names}
                if unused := sorted(names - used):
                    found.append(f"{path}:{node.lineno} imports {', '.join(unused)} only to pass it on")
    return found


def fences_broken(modules: Modules) -> list[str]:
    found = []
    for package in FENCED:
        users = {path for path, m in modules.items() if any(is_within(name, package) for name, _ in imports(m, path))}
        users = {path for path in users if not path.startswith("convert/")}
        if len(users) > 1:
            found.append(f"{package} is imported by {', '.join(sorted(users))}: keep it in one file")
    return found


def cuda_outside_its_file(modules: Modules) -> list[str]:
    """The device comes from the run file and torch.accelerator; only base/device.py may say torch.cuda.

    And the card that is not there, which answers for it.
    """
    found = []
    for path, module in modules.items():
        if path in ("base/device.py", "audit/fake_cuda.py", "audit/generated.py"):
            continue
        lines = [
            node.lineno
            for node in ast.walk(module)
            if isinstance(node, ast.Attribute)
            and node.attr == "cuda"
            and isinstance(node.value, ast.Name)
            and node.value.id == "torch"
        ]
        lines += [line for name, line in imports(module, path) if is_within(name, "torch.cuda")]
        found += [f"{path}:{line} uses torch.cuda: ask base/device.py" for line in lines]
    return found


def too_long(modules: Modules) -> list[str]:
    found = []
    for path, module in modules.items():
        last = max((node.end_lineno for node in module.body if node.end_lineno), default=0)
        if last > LONGEST_FILE:
            found.append(f"{path} has {last} lines: at most {LONGEST_FILE}")
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    found.append(f"{path}:{node.lineno} {node.name} has {lines} lines: at most {LONGEST_FUNCTION}")
    return found


RULES: list[Callable[[Modules], list[str]]] = [
    unknown_folders,
    imports_that_point_up,
    import_cycles,
    reexports,
    fences_broken,
    cuda_outside_its_file,
    too_long,
]

# ------------------------------------------------------------------------------------------------ the package


@pytest.fixture(scope="module")
def package() -> Modules:
    files = sorted(PACKAGE.rglob("*.py"))
    return {str(file.relative_to(PACKAGE)): ast.parse(file.read_text(encoding="utf-8"), str(file)) for file in files}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps(rule, package):
    assert rule(package) == []


def test_every_module_says_what_it_is_for(package):
    assert [path for path, module in package.items() if not ast.get_docstring(module)] == []


@pytest.mark.parametrize(
    ("rule", "files", "words"),
    [
        (unknown_folders, {"elsewhere/a.py": ""}, "megatrain/elsewhere stands on no floor"),
        (imports_that_point_up, {"nn/a.py": "from megatrain.models import b"}, "nn/a.py:1 (nn, floor 2) imports"),
        (imports_that_point_up, {"data/a.py": "import megatrain.optim.b"}, "data/a.py:1"),
        (imports_that_point_up, {"base/a.py": "def f():\n  from megatrain.cli.main import main"}, "base/a.py:2"),
        (imports_that_point_up, {"base/a.py": "if TYPE_CHECKING:\n  from ..nn import b"}, "base/a.py:2"),
        (import_cycles, {"nn/a.py": "from megatrain.nn.b import x", "nn/b.py": "from .a import y"}, "nn/a.py -> nn/b"),
        (reexports, {"nn/__init__.py": "from megatrain.nn.norm import RMSNorm"}, "RMSNorm only to pass it on"),
        (fences_broken, {"train/a.py": "import wandb", "cli/b.py": "def f():\n  from wandb import x"}, "wandb is"),
        (cuda_outside_its_file, {"nn/a.py": "x = 1\ntorch.cuda.synchronize()"}, "nn/a.py:2 uses torch.cuda"),
        (cuda_outside_its_file, {"nn/a.py": "from torch.cuda import synchronize"}, "nn/a.py:1 uses torch.cuda"),
        (too_long, {"nn/a.py": "def f():\n" + "  x = 1\n" * 100}, "f has 101 lines"),
        (too_long, {"nn/a.py": "x = 1\n" * 851}, "nn/a.py has 851 lines"),
    ],
)  # fmt: skip
def test_a_planted_mistake_is_found(rule, files, words):
    found = rule({path: ast.parse(text) for path, text in files.items()})
    assert len(found) == 1
    assert words in found[0]


def test_what_is_allowed_is_not_complained_about():
    modules = {
        "nn/norm/__init__.py": "from megatrain.base.registry import Registry\nNORM = Registry('norm', __name__)",
        "nn/norm/rms.py": "from megatrain.nn.norm import NORM\nfrom megatrain.parallel.mesh import Axis",
        "convert/a.py": "import deepspeed",
        "engine/b.py": "import deepspeed",
        "base/device.py": "torch.cuda.is_available()",
    }
    parsed = {path: ast.parse(text) for path, text in modules.items()}
    assert [sentence for rule in RULES for sentence in rule(parsed)] == []


def test_importing_megatrain_loads_neither_torch_nor_deepspeed():
    code = "import sys, megatrain; print(sorted({'torch', 'deepspeed', 'numpy'} & set(sys.modules)), dir(megatrain))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] [")
    assert "train" in done.stdout
