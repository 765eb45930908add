"""The data commands that need a run file."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from megatrain.base.errors import ConfigError
from megatrain.cli.data import command
from megatrain.data.build import BuildOptions, build

RUN = """
model: {kind: decoder, d_model: 16, n_layers: 1, n_heads: 2, d_ff: 16}
data: {sources: [{path: DATA}], seq_len: 16, workers: 0}
train: {steps: 4, global_batch: 4}
optimizer: {kind: adamw, lr: 1e-3}
schedule: {kind: cosine, warmup: 1}
"""


@pytest.fixture(scope="module")
def run_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trace")
    (folder / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"document number {i} " * 4}) + "\n" for i in range(40))
    )
    build(BuildOptions((folder / "a.jsonl",), folder / "data", vocab_size=270))
    (folder / "run.yaml").write_text(RUN.replace("DATA", str(folder / "data")))
    return folder / "run.yaml"


def trace(run_file: Path, *arguments: str) -> list[dict]:
    result = CliRunner().invoke(command, ["trace", str(run_file), *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    return [json.loads(line) for line in result.output.splitlines()]


def test_the_trace_is_a_line_a_batch_and_the_same_for_any_number_of_ranks(run_file):
    alone = trace(run_file, "--steps", "0:6")
    assert [row["step"] for row in alone] == list(range(6))
    assert len({row["sha256"] for row in alone}) == 6
    assert trace(run_file, "--steps", "2:6", "--dp", "2") == alone[2:]
    assert trace(run_file, "--steps", "0:6", "seed=1") != alone


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: what a shell sees of it."""
    command = [sys.executable, "-m", "megatrain", "data", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_what_is_wrong_is_one_sentence_and_code_2_and_damage_is_code_1(run_file, tmp_path):
    built, tokenizer = run_file.parent / "data", run_file.parent / "data/tokenizer.json"
    damaged = tmp_path / "damaged"
    shutil.copytree(built, damaged)
    next((damaged / "train").glob("*.tar")).unlink()
    assert call("verify", built).returncode == 0
    done = call("verify", damaged, "--json")
    assert (done.returncode, json.loads(done.stdout)["ok"]) == (1, False)
    for words, message in (
        (("verify", built, "--workers", "0"), "--workers"),
        (("trace", run_file, "--dp", "0"), "--dp"),
        (("trace", run_file, "data.sources.0.weight=.inf"), "must be a finite number"),
        (("trace", run_file, "data.sources.0.weight=0"), "must be a number above 0"),
        (("trace", run_file, "data.sources.0.path=http://[::1"), "is no address"),
        (("trace", run_file, "data.sources.0.path=http://"), "names no host"),
        (("trace", run_file, "data.sources.0.path=http://u:PW@127.0.0.1:99999/x"), "is no address"),
        (("build", run_file, "--separator", "", "--out", tmp_path / "o"), "separator is empty"),
        (("build", built, "--out", tmp_path / "o"), "is a data set that was built already"),
        (("build", run_file, run_file, "--out", tmp_path / "o"), "twice"),
        (("build", run_file.parent / "a.jsonl", "--text-field", "no", "--out", tmp_path / "o"), "--text-field"),
        (("index", run_file, "--tokenizer", tokenizer), "is no folder"),
        (("index", built.parent, "--tokenizer", run_file), "is not a tokenizer"),
        (("seen", tmp_path / "nothing", "--document", "a"), "does not exist"),
    ):
        done = call(*words)
        assert done.returncode == 2, f"{words}: {done.stdout}{done.stderr}"
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert "PW" not in done.stderr


def test_a_range_that_is_none_is_refused(run_file):
    for steps in ("4", "4:2", "a:b", "-1:2", ""):
        with pytest.raises(ConfigError, match="is no range of steps"):
            CliRunner().invoke(command, ["trace", str(run_file), "--steps", steps], catch_exceptions=False)


def test_a_run_can_be_asked_when_it_saw_a_document(run_file, tmp_path, monkeypatch):
    from megatrain.train.run import train

    monkeypatch.chdir(tmp_path)
    train(str(run_file), ["log.wandb.mode=disabled", "checkpoint.every=3", "train.eval_batches=1"])
    met = {row["step"] + 1: row["documents"] for row in trace(run_file, "--steps", "0:4")}
    for document in sorted(set().union(*met.values()))[:5]:
        arguments = ["seen", "runs/run", "--document", document, "--json"]
        found = json.loads(CliRunner().invoke(command, arguments, catch_exceptions=False).output)
        assert found["steps"] == [step for step, documents in met.items() if document in documents]
    with pytest.raises(ConfigError, match="either --document ID or --contains TEXT"):
        CliRunner().invoke(command, ["seen", "runs/run"], catch_exceptions=False)


def test_raw_text_is_indexed_and_traced_where_it_lies(run_file, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.jsonl").write_bytes((run_file.parent / "a.jsonl").read_bytes())
    tokenizer = run_file.parent / "data/tokenizer.json"
    arguments = ["index", str(tmp_path / "text"), "--tokenizer", str(tokenizer), "--held-out", "0.2", "--workers", "1"]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "train: " in result.output
    assert "raw text in 1 shards" in result.output
    other = tmp_path / "run.yaml"
    other.write_text(RUN.replace("DATA", str(tmp_path / "text")))
    assert trace(other, "--steps", "2:5") == trace(other, "--steps", "0:5", "--dp", "2")[2:]
    assert CliRunner().invoke(command, ["verify", str(tmp_path / "text")]).exit_code == 0
