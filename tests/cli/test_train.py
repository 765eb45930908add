"""`megatrain train` as people call it: codes, signals, ranks started by us and by torchrun, every kind of bad input."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from megatrain.base import units
from megatrain.cli.main import main
from megatrain.train.config import read_run
from tests.train.small import metrics, write_run

CONFIGS = Path(__file__).parents[2] / "configs"


def call(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """(exit code, stderr) of the command, in this process."""
    with pytest.raises(SystemExit) as done:
        main(list(arguments))
    return int(done.value.code or 0), capsys.readouterr().err


def started(folder: Path, *command: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    return subprocess.Popen(
        [sys.executable, "-m", *command], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    )


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str], patience: float = 120) -> None:
    """Return when the run's metrics reach `step`."""
    deadline = time.monotonic() + patience
    while not (run / "metrics.jsonl").exists() or len(metrics(run)) < step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.05)


# ------------------------------------------------------------------------------------------------ real processes


def test_ctrl_c_ends_the_step_saves_and_exits_75_and_the_run_goes_on(tmp_path: Path, text_data: Path) -> None:
    path = write_run(tmp_path, text_data, train__steps=400, checkpoint__every=1000)
    run = tmp_path / "runs/small"
    process = started(tmp_path, "megatrain", "train", str(path), "--nproc", "2")
    wait_for_step(run, 3, process)
    process.send_signal(signal.SIGINT)
    _, words = process.communicate(timeout=120)
    assert process.returncode == 75, words
    assert "stopped after step" in words
    stopped_at = len(metrics(run))
    assert stopped_at < 400
    assert (run / f"checkpoints/step-{stopped_at:08d}/COMMIT").exists()

    process = started(
        tmp_path, "megatrain", "train", str(path), "--nproc", "2", f"hooks=[{{kind: pause, at: {stopped_at + 2}}}]"
    )
    _, words = process.communicate(timeout=120)
    assert process.returncode == 75, words
    assert f"resumed at step {stopped_at} of 400" in words
    assert [line["step"] for line in metrics(run)] == list(range(1, stopped_at + 3))


def test_torchrun_runs_the_same_and_a_killed_rank_ends_the_others(tmp_path: Path, text_data: Path) -> None:
    path = write_run(tmp_path, text_data, train__steps=400, checkpoint__every=5, checkpoint__async=False)
    run = tmp_path / "runs/small"
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "megatrain", "train", str(path))
    process = started(tmp_path, *torchrun)
    wait_for_step(run, 7, process)
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "train" in p.cmdline()]
    assert len(ranks) == 2
    ranks[1].kill()
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert not [p for p in ranks if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    process = started(tmp_path, *torchrun, "hooks=[{kind: pause, at: 12}]")
    _, words = process.communicate(timeout=120)
    assert "resumed at step" in words
    assert [line["step"] for line in metrics(run)] == list(range(1, 13))


def test_a_rank_killed_under_nproc_is_named_with_the_step_to_go_on_from(tmp_path: Path, text_data: Path) -> None:
    path = write_run(tmp_path, text_data, train__steps=400, checkpoint__every=5, checkpoint__async=False)
    process = started(tmp_path, "megatrain", "train", str(path), "--nproc", "2", "layout.engine=plain")
    wait_for_step(tmp_path / "runs/small", 7, process)
    ranks = sorted(psutil.Process(process.pid).children(), key=lambda p: p.environ()["RANK"])
    ranks[1].kill()
    _, words = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "rank 1 of 2 was ended by SIGKILL" in words
    assert re.search(r"another rank is gone .* goes on from step \d*[05]\n", words), words
    assert "Traceback" not in words
    assert "said:" not in words


def test_a_port_in_use_is_one_sentence(tmp_path: Path, text_data: Path) -> None:
    path = write_run(tmp_path, text_data)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        environment = os.environ | ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "megatrain", "train", str(path)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert port in done.stderr
    assert "MASTER_PORT" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------------ bad input

REFUSED: list[tuple[str, dict[str, Any], list[str], str]] = [
    ("no data", {"data__sources": [{"path": "nowhere"}]}, [], "nowhere is no folder"),
    ("no sources", {"data__sources": []}, [], "data.sources"),
    ("both budgets", {"train__tokens": "1M"}, [], "exactly one of steps and tokens"),
    ("no budget", {"train__steps": None}, [], "exactly one of steps and tokens"),
    ("heads", {"model__n_heads": 5}, [], "does not divide by n_heads=5"),
    ("kv heads", {"model__n_kv_heads": 3}, [], "n_kv_heads=3"),
    ("odd head", {"model__head_dim": 7}, [], "head_dim=7 is odd"),
    ("small vocabulary", {"model__vocab_size": 7}, [], "model.vocab_size=7 is smaller than"),
    ("long warm-up", {"schedule__warmup": 1000}, [], "schedule.warmup=1000 steps leaves nothing of a run of 12 steps"),
    ("micro batch", {"layout__micro_batch": 3}, [], "layout.micro_batch=3 does not divide"),
    ("tensor parallel", {"layout__tp": 3}, [], "tp x pp x cp = 3 x 1 x 1 = 3 does not divide the 1 ranks"),
    ("data parallel", {"layout__dp": 2}, [], "layout.dp=2"),
    ("recompute", {"layout__recompute": "7-9"}, [], "names no block from 0 to 1"),
    ("engine", {"layout__engine": "deepsped"}, [], "did you mean deepspeed?"),
    ("stage", {"layout__zero": 5}, [], "zero=5"),
    ("plain with stages", {"layout__engine": "plain", "layout__zero": 2}, [], "plain engine shards nothing"),
    ("number", {"optimizer__lr": "fast"}, [], "optimizer.lr"),
    ("unit", {"train__steps": "12 miles"}, [], "is not a number of steps"),
    ("kind", {"optimizer__kind": "adamv"}, [], "did you mean adamw?"),
    ("no tokenizer", {"tokenizer": "nowhere.json"}, [], "tokenizer is nowhere.json, which is no file"),
    ("name", {"name": "a/b"}, [], "it names a folder"),
    ("override", {}, ["train.steps"], "is not key=value"),
    ("half a list", {}, ["hooks=[{kind:"], "quote the whole word for the shell"),
    ("absent element", {}, ["data.sources.1.path=x"], "write the whole list"),
    ("steps", {"train__steps": 10**22}, [], "at most 1,000,000,000"),
    ("unknown override", {}, ["train.stepz=3"], "did you mean steps?"),
    ("precision", {"precision__parameters": "bf16"}, [], "compute=bf16"),
    ("fp16", {"precision__compute": "fp16"}, [], "compute=fp16"),
    ("log folder is a file", {"log__dir": __file__}, [], "cannot be made"),
    ("init_from", {"checkpoint__init_from": "nowhere"}, [], "nowhere"),
    ("large batch", {"train__global_batch": 4096}, [], "give more data, or lower train.global_batch"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "overrides", "words"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_bad_input_is_refused_with_a_sentence_and_code_2(
    tmp_path: Path,
    text_data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    overrides: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, error = call("train", str(write_run(tmp_path, text_data, **changes)), *overrides, capsys=capsys)
    assert code == 2
    assert words in error
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_all_problems_are_shown_at_once(tmp_path: Path, text_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path, text_data, model__n_headz=3, optimizer__lr="fast", train__bath=1)
    code, error = call("train", str(path), capsys=capsys)
    assert code == 2
    assert all(key in error for key in ("model.n_headz", "optimizer.lr", "train.bath"))


def test_a_missing_run_file_and_an_unknown_command_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    code, error = call("train", "nowhere.yaml", capsys=capsys)
    assert (code, "no run file nowhere.yaml" in error) == (2, True)
    code, error = call("trian", capsys=capsys)
    assert (code, "did you mean train?" in error) == (2, True)


# ------------------------------------------------------------------------------------------------ explain


def test_explain_names_file_and_line_of_each_value(
    tmp_path: Path, text_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path, text_data)
    with pytest.raises(SystemExit) as done:
        main(["explain", str(path), "optimizer.lr=0.5", "--json"])
    assert not done.value.code
    rows = json.loads(capsys.readouterr().out)
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if "d_ff" in text)
    assert rows["model.d_ff"] == {"value": 48, "origin": f"{path}:{line}"}
    assert rows["optimizer.lr"] == {"value": 0.5, "origin": "command line"}
    assert rows["optimizer.weight_decay"]["origin"] == "default"


def test_explain_draws_the_schedule_of_a_pipeline(
    tmp_path: Path, text_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_run(tmp_path, text_data, model__n_layers=5, layout__pp=2, layout__schedule="zbv"))
    png = tmp_path / "x.png"
    with pytest.raises(SystemExit) as done:
        main(["explain", path, "--schedule", "--png", str(png), "--ranks", "2"])
    assert not done.value.code
    out = capsys.readouterr().out
    assert "rank 1 idle   4.0%" in out
    assert "closed form, stages of equal cost: 4.0%" in out
    assert png.read_bytes().startswith(b"\x89PNG")
    code, error = call("explain", path, "--schedule", "layout.pp=1", capsys=capsys)
    assert (code, "no schedule to draw" in error) == (2, True)
    code, error = call("explain", path, "--schedule", "model.n_layers=3", capsys=capsys)
    assert (code, "cannot make pp 2 x virtual 2 = 4 stages" in error) == (2, True)


def test_a_schedule_is_also_json_and_a_picture_that_cannot_be_is_refused(
    tmp_path: Path, text_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_run(tmp_path, text_data, model__n_layers=5, layout__pp=2))
    with pytest.raises(SystemExit):
        main(["explain", path, "--schedule", "--json"])
    told = json.loads(capsys.readouterr().out)
    m = told["micro_batches"]
    assert told["idle"] == pytest.approx([1 / (m + 1)] * 2)  # 1f1b on two ranks, whatever m
    assert told["idle_closed_form"] == pytest.approx(1 / (m + 1))
    assert [len(bars) for bars in told["ranks"]] == [2 * m] * 2
    for wrong, words in {
        "x.txt": "no name of a PNG",
        str(tmp_path): "no name of a PNG",
        "/none/x.png": "cannot be",
    }.items():
        code, error = call("explain", path, "--schedule", "--png", wrong, capsys=capsys)
        assert (code, words in error) == (2, True)
    code, error = call("explain", path, "--png", "x.png", capsys=capsys)
    assert (code, "are for --schedule" in error) == (2, True)
    long = ["train.global_batch=40000", "layout.micro_batch=1"]
    code, error = call("explain", path, "--schedule", *long, capsys=capsys)
    assert (code, "160,000 actions, more than the 20,000" in error) == (2, True)


def test_explain_says_what_the_layout_would_be_refused_for(
    tmp_path: Path, text_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_run(tmp_path, text_data))
    code, error = call("explain", path, "layout.tp=3", capsys=capsys)
    assert code == 0
    assert "on 3 ranks, the fewest of this layout, it would be refused: model.n_heads=4 cannot be split" in error


def test_a_pattern_that_is_the_name_of_no_parameter_is_told_before_anything_is_started(
    tmp_path: Path, text_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_run(tmp_path, text_data))
    asked = "optimizer.groups=[{match: '*.nrom.*', weight_decay: 0.0}]"
    sentence = "optimizer.groups.0.match is '*.nrom.*', which is the name of no parameter"
    code, error = call("explain", path, asked, capsys=capsys)
    assert (code, sentence in error) == (0, True)
    code, error = call("train", path, asked, capsys=capsys)
    assert (code, sentence in error) == (2, True)
    assert not (tmp_path / "runs").exists()


def test_ranks_of_different_layouts_are_told_so_before_they_wait_for_each_other(
    tmp_path: Path, text_data: Path
) -> None:
    path = write_run(tmp_path, text_data)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "megatrain", "train", str(path), *words], cwd=tmp_path, text=True,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE,
        )
        for rank, words in enumerate((["layout.tp=2"], []))
    ]  # fmt: skip
    for process in ranks:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 2, error
        assert "ranks do not agree on config.layout.tp: rank 0 has 2, rank 1 has 1" in error


@pytest.mark.parametrize("path", sorted((CONFIGS / "run").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_run_explains_itself(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = call("explain", str(path), capsys=capsys)
    assert code == 0


@pytest.mark.parametrize("path", sorted((CONFIGS / "model").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_model_has_the_parameters_that_its_name_says(path: Path, tmp_path: Path) -> None:
    part = tmp_path / "run.yaml"
    part.write_text(yaml.safe_dump({"base": [str(CONFIGS / "run/llama-124m.yaml"), str(path)]}))
    run = read_run(part).run
    said = units.count(path.stem.split("-")[-1], "parameters")
    vocabulary = {"llama-1b": 128_256, "llama-8b": 128_256, "gpt2-124m": 50_257}.get(path.stem, 32_000)
    assert run.model.n_parameters(vocabulary) == pytest.approx(said, rel=0.25)
