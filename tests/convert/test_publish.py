"""What a conversion leaves where it was asked to write: all of it after its proof, and nothing before."""

import dataclasses
import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatrain.base.errors import CheckpointError, FailedCheckpointError
from megatrain.checkpoint.read import find
from megatrain.convert.check import Proof
from megatrain.convert.deepspeed import to_deepspeed
from megatrain.convert.hugging_face import from_hugging_face, to_hugging_face
from tests.convert.test_deepspeed import with_moments
from tests.convert.test_hugging_face import SMALL, make


@pytest.fixture
def trained(tmp_path):
    """A converted model, with moments as if it had been trained on."""
    make(tmp_path / "theirs", "llama", SMALL)
    with_moments(tmp_path)
    return tmp_path / "trained"


WAYS = {
    "from-hf": lambda folder, out: from_hugging_face(folder / "theirs", out),
    "to-hf": lambda folder, out: to_hugging_face(folder / "trained", out),
    "to-deepspeed": lambda folder, out: to_deepspeed(folder / "trained", out),
    "to-deepspeed --ranks": lambda folder, out: to_deepspeed(folder / "trained", out, ranks=2),
}


def left_by(folder) -> list[str]:
    return sorted({path.name for path in folder.iterdir()} - {"theirs", "converted", "trained"})


@pytest.mark.parametrize("way", WAYS)
def test_nothing_has_the_name_while_it_is_proven(way, tmp_path, trained, monkeypatch):
    seen, report = [], Proof.report
    monkeypatch.setattr(Proof, "report", lambda proof: seen.append((tmp_path / "out").exists()) or report(proof))
    assert WAYS[way](tmp_path, tmp_path / "out").passed
    assert seen == [False]
    assert left_by(tmp_path) == ["out"]
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["passed"]


@pytest.mark.parametrize("way", WAYS)
def test_a_proof_that_is_interrupted_leaves_nothing(way, tmp_path, trained, monkeypatch):
    def interrupt(proof):
        raise KeyboardInterrupt

    monkeypatch.setattr(Proof, "report", interrupt)
    with pytest.raises(KeyboardInterrupt):
        WAYS[way](tmp_path, tmp_path / "out")
    assert left_by(tmp_path) == []


KILLED = """
import os, sys
from megatrain.convert.check import Proof
from megatrain.convert.hugging_face import to_hugging_face
Proof.report = lambda proof: os.kill(os.getpid(), 9)
to_hugging_face(*sys.argv[1:3])
"""


def test_a_proof_that_is_killed_leaves_no_unproven_output_and_does_not_block_the_next(tmp_path, trained):
    words = [sys.executable, "-c", KILLED, str(trained), str(tmp_path / "out")]
    assert subprocess.run(words, check=False).returncode == -9
    assert not (tmp_path / "out").exists()
    assert left_by(tmp_path) == [".out.unproven"]
    assert to_hugging_face(trained, tmp_path / "out").passed
    assert left_by(tmp_path) == ["out"]


@pytest.mark.parametrize("way", WAYS)
def test_a_disk_that_takes_no_more_is_a_sentence_and_leaves_nothing(way, tmp_path, trained):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"writing \S*/out failed: .*File too large") as told:
            WAYS[way](tmp_path, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "unproven" not in str(told.value)
    assert left_by(tmp_path) == []


def test_two_at_once_to_one_place_are_one(tmp_path, trained, monkeypatch):
    """The second would throw away what the first makes, or be published under its proof."""
    report, refused = Proof.report, []

    def second_meanwhile(proof):
        with pytest.raises(CheckpointError, match=r"another conversion to .*out is under way") as told:
            from_hugging_face(tmp_path / "theirs", tmp_path / "out")
        refused.append(told)
        return report(proof)

    monkeypatch.setattr(Proof, "report", second_meanwhile)
    assert to_hugging_face(trained, tmp_path / "out").passed
    assert len(refused) == 1
    assert left_by(tmp_path) == ["out"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"


def test_a_place_that_came_to_be_during_the_proof_is_left_alone(tmp_path, trained, monkeypatch):
    report = Proof.report
    monkeypatch.setattr(Proof, "report", lambda proof: (tmp_path / "out").mkdir() or report(proof))
    with pytest.raises(CheckpointError, match="out exists"):
        to_hugging_face(trained, tmp_path / "out")
    assert left_by(tmp_path) == ["out"]
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("kind", ["folder", "file", "an earlier failure"])
def test_a_failure_replaces_an_earlier_one_and_nothing_else(kind, tmp_path, trained, monkeypatch):
    there = tmp_path / "out.failed"
    if kind == "file":
        there.write_text("mine")
    else:
        there.mkdir()
        (there / ("conversion.json" if kind == "an earlier failure" else "precious")).write_text("mine")
    report = Proof.report
    monkeypatch.setattr(Proof, "report", lambda proof: dataclasses.replace(report(proof), largest_difference=1.0))
    failed = "out.failed" if kind == "an earlier failure" else "out.failed2"
    with pytest.raises(FailedCheckpointError, match=rf"differ by 1 .*: see \S*/{failed}, and do not use it"):
        to_hugging_face(trained, tmp_path / "out")
    assert json.loads((tmp_path / failed / "conversion.json").read_text())["passed"] is False
    if kind != "an earlier failure":
        assert (there if kind == "file" else there / "precious").read_text() == "mine"


def test_a_model_whose_logits_are_not_finite_is_told_so(tmp_path, trained):
    held = load_file(tmp_path / "theirs" / "model.safetensors")
    held["model.norm.weight"][0] = float("nan")
    save_file(held, tmp_path / "theirs" / "model.safetensors", {"format": "pt"})
    with pytest.raises(FailedCheckpointError, match="theirs has logits that are not finite, so nothing can be proven"):
        from_hugging_face(tmp_path / "theirs", tmp_path / "out")


def test_a_folder_that_is_read_is_not_written_into(tmp_path, trained):
    with pytest.raises(CheckpointError, match="which is only read"):
        from_hugging_face(tmp_path / "theirs", tmp_path / "theirs" / "inside")


def test_a_name_as_long_as_a_file_system_has_can_be_made(tmp_path, trained):
    longest = os.pathconf(tmp_path, "PC_NAME_MAX") - len(".partial-12345678")
    assert from_hugging_face(tmp_path / "theirs", tmp_path / ("n" * longest)).passed
    with pytest.raises(CheckpointError, match=f"give one of 1 to {longest} bytes"):
        from_hugging_face(tmp_path / "theirs", tmp_path / ("n" * (longest + 1)))


def test_sides_of_unequal_width_are_no_proof(tmp_path, trained):
    class Wider:
        def logits(self, tokens):
            return torch.zeros(*tokens.shape, SMALL["vocab_size"] + 1)

    with pytest.raises(CheckpointError, match="one side has logits of 61 tokens, the other of 62"):
        Proof(find(trained), Wider(), "llama", "a", "b").report()
