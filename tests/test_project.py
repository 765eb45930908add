"""What stands around the package keeps its word: scripts, make targets, documents, version."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

import megatrain
from megatrain.cli.main import group

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
SCRIPTS = [".ci/run", *(f"launch/{path.name}" for path in sorted((ROOT / "launch").glob("*.sh")))]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True)


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------ documents


def commands() -> set[str]:
    return set(group.list_commands(click.Context(group)))


@pytest.mark.parametrize("name", [*DOCUMENTS, "Makefile", "launch/torchrun.sh"])
def test_documents_name_only_commands_that_exist(name):
    named = set(re.findall(r"(?:^|[\s`/]|-m )megatrain ([a-z]+)\b", text(name), re.MULTILINE))
    assert named <= commands(), named - commands()


def test_the_readme_shows_the_main_commands():
    named = set(re.findall(r"megatrain ([a-z]+)\b", text("README.md")))
    assert {"train", "data", "generate", "report", "explain"} <= named


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_name_only_files_that_exist(name):
    links = set(re.findall(r"\]\(([^)#:]+)\)", text(name)))
    paths = set(re.findall(r"`((?:configs|launch|docker|tools|tests|megatrain)/[\w./-]*)`", text(name)))
    assert links | paths
    assert [path for path in sorted(links | paths) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_name_only_make_targets_that_exist(name):
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
    assert {"setup", "demo", "test", "test-slow", "check", "bench", "clean"} <= targets
    assert set(re.findall(r"make ([a-z-]+)\b(?=[`\s]*(?:#|\n|$|`|\)|:|;))", text(name))) <= targets


def test_the_run_file_keys_of_the_readme_are_known():
    from megatrain.train.run import read_run

    calls = re.findall(r"megatrain (?:train|explain) (configs/\S+\.yaml)(.*)", text("README.md"))
    assert calls
    for path, words in calls:
        overrides = [word for word in words.split() if re.fullmatch(r"[\w.]+=\S+", word)]
        assert read_run(ROOT / path, overrides).run.name


def test_each_reason_is_numbered_in_order_and_short():
    section = text("CONTRIBUTING.md").split("## Why it is so")[1]
    paragraphs = re.findall(r"^(\d+)\. \*\*(.+?)\*\*(.*?)(?=\n\n|\Z)", section, re.MULTILINE | re.DOTALL)
    assert [int(number) for number, _, _ in paragraphs] == list(range(1, len(paragraphs) + 1))
    assert {title: body.count("\n") + 1 for _, title, body in paragraphs if not 3 <= body.count("\n") + 1 <= 7} == {}


def test_reasons_cited_in_code_exist():
    numbers = set(re.findall(r"^(\d+)\. \*\*", text("CONTRIBUTING.md"), re.MULTILINE))
    for path in (ROOT / "megatrain").rglob("*.py"):
        assert set(re.findall(r"\bwhy (\d+)", path.read_text(encoding="utf-8"))) <= numbers, path


def test_the_version_is_one_and_the_changelog_is_open():
    project = tomllib.loads(text("pyproject.toml"))["project"]
    assert project["version"] == megatrain.__version__
    assert "## [Unreleased]" in text("CHANGELOG.md")


# ------------------------------------------------------------------------------------------------ scripts


@pytest.mark.parametrize("script", SCRIPTS)
def test_shell_scripts_are_clean_and_can_be_run(script):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "shellcheck is missing: make setup installs it"
    assert os.access(ROOT / script, os.X_OK)
    done = run(shellcheck, script)
    assert done.returncode == 0, done.stdout


def test_the_list_of_make_targets_is_the_default():
    done = run("make", "--silent")
    assert done.returncode == 0
    assert "make setup" in done.stdout


def test_the_help_of_torchrun_sh_names_what_it_reads():
    done = run("bash", "launch/torchrun.sh", "--help")
    assert done.returncode == 0
    read = set(re.findall(r"\$\{([A-Z_]+):-", text("launch/torchrun.sh"))) - {"CUDA_VISIBLE_DEVICES"}
    assert {name for name in read if name not in done.stdout} == set()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "--nproc-per-node 1 --max-restarts 0 --standalone -m megatrain train a.yaml x=1\\ 2"),
        ({"CUDA_VISIBLE_DEVICES": "0,2,3"}, "--nproc-per-node 3 "),
        ({"NPROC": "2", "CUDA_VISIBLE_DEVICES": "0"}, "--nproc-per-node 2 "),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "n0"},
            "--nnodes 2 --node-rank 1 --master-addr n0 --master-port 29500 -m megatrain",
        ),
        ({"IFNAME": "ib0"}, "NCCL_SOCKET_IFNAME=ib0\nGLOO_SOCKET_IFNAME=ib0"),
        ({"IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "mine"}, "NCCL_SOCKET_IFNAME=mine\nGLOO_SOCKET_IFNAME=ib0"),
        ({"NO_IB": "1"}, "NCCL_IB_DISABLE=1"),
        ({"SAVE_SECONDS": "30"}, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=30"),
    ],
)
def test_torchrun_sh_starts(environment, words):
    done = run("bash", "launch/torchrun.sh", "a.yaml", "x=1 2", DRY_RUN="1", PYTHON=sys.executable, **environment)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"NNODES": "two"}, "NNODES=two is not a whole number from 1 to"),
        ({"NNODES": "2"}, "NODE_RANK is not set: give this node's number, from 0 to 1"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2 is not a whole number from 0 to 1"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR is not set"),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "cannot be reached from other nodes"),
        ({"NPROC": "0"}, "NPROC=0 is not a whole number from 1"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is not a whole number from 1 to 65535"),
    ],
)
def test_torchrun_sh_refuses(environment, words):
    done = run("bash", "launch/torchrun.sh", "a.yaml", DRY_RUN="1", **environment)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stdout == ""


def test_a_call_of_torchrun_sh_without_a_run_file_is_refused():
    done = run("bash", "launch/torchrun.sh")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


# ------------------------------------------------------------------------------------------------ the image


def test_the_image_copies_only_what_is_there_and_is_no_root():
    lines = text("docker/Dockerfile").splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert copied
    assert [path for path in copied if not (ROOT / path).exists()] == []
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users
    assert users[-1] != "root"
