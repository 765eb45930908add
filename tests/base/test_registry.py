"""Registries filled by folder scan, over packages written for the test."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatrain.base.errors import ConfigError
from megatrain.base.registry import Registry


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes the modules of a package named for the test, whose __init__ holds the registry FRUIT."""
    name = f"fruit_{tmp_path.name}"
    folder = tmp_path / name
    folder.mkdir()
    init = f"from megatrain.base.registry import Registry\nFRUIT = Registry('fruit', {name!r})\n"
    (folder / "__init__.py").write_text(init)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(**modules: str) -> Registry:
        head = f"from dataclasses import dataclass\nfrom {name} import FRUIT\n"
        for module, body in modules.items():
            (folder / f"{module}.py").write_text(head + body)
        return __import__(name).FRUIT

    yield write
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        del sys.modules[module]


def member(kind: str, name: str) -> str:
    return f"@FRUIT.register({kind!r})\n@dataclass(frozen=True)\nclass {name}: pass\n"


def test_a_new_file_is_a_new_member(package):
    fruit = package(apple=member("apple", "Apple"), pear=member("pear", "Pear"))
    assert fruit.kinds() == ["apple", "pear"]
    assert fruit["pear"].__name__ == "Pear"
    assert fruit["pear"].kind == "pear"
    assert [kind for kind, _ in fruit.items()] == ["apple", "pear"]
    assert "apple" in fruit
    assert "plum" not in fruit
    assert ["apple"] not in fruit


def test_an_unknown_kind_is_refused_with_the_nearest_one(package):
    fruit = package(apple=member("apple", "Apple"), pear=member("pear", "Pear"))
    with pytest.raises(
        ConfigError, match=r"fruit kind 'aple' is not known: did you mean apple\? \(allowed: apple, pear\)"
    ):
        fruit["aple"]


def test_a_file_that_does_not_import_is_named_and_its_cause_kept(package):
    fruit = package(broken="import no_such_module_anywhere\n")
    with pytest.raises(ImportError, match=r"fruit registry could not import .*\.broken: No module named") as caught:
        fruit.kinds()
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    with pytest.raises(ImportError):  # and it stays an error: half a registry is never taken for a whole one
        fruit.kinds()


def test_two_files_cannot_claim_one_kind(package):
    fruit = package(apple=member("apple", "Apple"), other=member("apple", "Other"))
    with pytest.raises(ImportError, match=r"'apple' is registered by both .*apple\.Apple and .*other\.Other"):
        fruit.kinds()


def test_only_frozen_dataclasses_can_be_registered_and_only_once():
    fruit: Registry = Registry("fruit", "megatrain.base")

    @dataclass
    class Soft: ...

    class Plain: ...

    @dataclass(frozen=True)
    class Hard: ...

    for cls in (Soft, Plain):
        with pytest.raises(TypeError, match="must be a frozen dataclass"):
            fruit.register("x")(cls)
    fruit.register("hard")(Hard)
    with pytest.raises(TypeError, match="Hard is registered as 'hard' already"):
        fruit.register("again")(Hard)
