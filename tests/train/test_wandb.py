"""wandb is told everything, and can do nothing to a run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatrain.train.hook import Handle
from megatrain.train.hooks import wandb
from megatrain.train.hooks.wandb import Wandb, resolve_mode

RECORD = {"step": 1, "loss": 2.5, "tokens": 64}


def hook(folder: Path, mode: str = "offline") -> Wandb:
    return Wandb(mode, "megatrain", Handle(folder, 0, 1, 3, 1, facts={"name": "small", "run_id": "abc123"}))


def test_without_a_key_it_is_offline_and_with_one_online(tmp_path: Path) -> None:
    assert resolve_mode("auto", {}, tmp_path) == "offline"
    assert resolve_mode("auto", {"WANDB_API_KEY": "x"}, tmp_path) == "online"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x")
    assert resolve_mode("auto", {}, tmp_path) == "online"
    assert resolve_mode("auto", {"WANDB_MODE": "offline"}, tmp_path) == "offline"
    assert resolve_mode("disabled", {"WANDB_API_KEY": "x"}, tmp_path) == "disabled"


def test_an_offline_run_holds_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "SECONDS_TO_FINISH", 120.0)
    sent = hook(tmp_path)
    for step in (1, 2, 3):
        sent.after_step(RECORD | {"step": step, "loss": 3.0 - step})
    sent.finish("finished")
    assert sent.dropped == 0
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--summary", "--json", str(run)]
    environment = os.environ | {"NO_COLOR": "1"}
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    summary = json.loads(shown)
    assert summary["summary"]["loss"] == 0.0
    assert summary["summary"]["step"] == 3


@pytest.mark.parametrize(
    "program",
    [
        "import time; time.sleep(1000)",
        "raise SystemExit(1)",
        "import sys; sys.stdin.close(); import time; time.sleep(9)",
    ],
    ids=["hangs", "dies", "does not listen"],
)
def test_a_wandb_that_hangs_or_dies_neither_stops_nor_slows_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    monkeypatch.setattr(wandb, "SECONDS_TO_FINISH", 0.2)
    real = subprocess.Popen
    monkeypatch.setattr(wandb.subprocess, "Popen", lambda command, **o: real([sys.executable, "-c", program], **o))
    sent = hook(tmp_path)
    begin = time.process_time()
    for step in range(5000):  # far more than a pipe holds
        sent.after_step(RECORD | {"step": step, "text": "x" * 100})
    assert time.process_time() - begin < 2
    assert sent.dropped > 0
    process = sent.process
    sent.finish("finished")
    assert process is not None
    assert process.poll() is not None


def test_other_ranks_and_disabled_runs_start_nothing(tmp_path: Path) -> None:
    assert hook(tmp_path, "disabled").process is None
    other = Handle(tmp_path, 1, 2, 3, 1, facts={"name": "small", "run_id": "abc123"})
    assert Wandb("offline", "megatrain", other).process is None
