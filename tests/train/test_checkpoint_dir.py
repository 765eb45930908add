"""Checkpoints that lie elsewhere than the run: in a folder, or in an object store that is a real server."""

import shutil
import uuid
from pathlib import Path

import pytest

import megatrain
from megatrain.base.errors import CheckpointError, ConfigError, PreemptedError
from megatrain.checkpoint.read import find
from megatrain.train.run import train
from tests.servers import ObjectServer
from tests.train.small import events, metrics, write_run

SHORT = {"train__steps": 4, "checkpoint__every": 2, "train__eval_every": 2}


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder)]


def test_a_run_saves_to_s3_resumes_from_it_and_is_generated_from(
    tmp_path: Path, text_data: Path, object_store: ObjectServer
) -> None:
    path = write_run(tmp_path, text_data, checkpoint__keep={"best": 1}, **SHORT)
    train(path, ["name=here"])
    place = object_store.upload(tmp_path / "empty", f"bucket-{uuid.uuid4().hex[:8]}", "runs")
    there = [f"checkpoint.dir={place}"]
    with pytest.raises(PreemptedError):
        train(path, ["name=there", *there, "hooks=[{kind: pause, at: 3}]"])
    assert not (tmp_path / "runs/there/checkpoints").exists()
    train(path, ["name=there", *there])
    assert [e["step"] for e in events(tmp_path / "runs/there", "resumed")] == [3]
    assert losses(tmp_path / "runs/there") == losses(tmp_path / "runs/here")
    assert train(path, ["name=there", *there]) == "already finished"
    for word in (f"{place}/there", str(tmp_path / "runs/there")):
        commit = find(word)
        assert (commit.step, commit.storage.describe()) == (4, f"{place}/there")
        assert megatrain.load(word).step == 4
    score = metrics(tmp_path / "runs/there")[-1]["held_out_loss"]
    assert commit.manifest.facts["score"] == score


def test_two_runs_under_one_folder_do_not_meet(tmp_path: Path, text_data: Path) -> None:
    path = write_run(tmp_path, text_data, train__steps=2, checkpoint__dir=str(tmp_path / "kept"))
    train(path, ["name=a"])
    train(path, ["name=b", "seed=1"])
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["a", "b"]
    assert find(tmp_path / "runs/b").digest != find(tmp_path / "runs/a").digest


def test_commits_left_in_a_runs_folder_are_not_those_of_its_checkpoint_dir(tmp_path: Path, text_data: Path) -> None:
    path = write_run(tmp_path, text_data, train__steps=2)
    train(path, ["name=a"])
    old = tmp_path / "runs/a/checkpoints"
    shutil.copytree(old, tmp_path / "kept/a")
    train(path, ["name=a", "train.steps=4", "checkpoint.acknowledge=[train.steps]", f"checkpoint.dir={tmp_path}/kept"])
    assert old.is_dir()
    assert find(tmp_path / "runs/a").step == megatrain.load(tmp_path / "runs/a").step == 4
    shutil.rmtree(old)
    shutil.rmtree(tmp_path / "kept")
    with pytest.raises(
        CheckpointError, match=rf"holds no checkpoint: .*\(its checkpoint\.dir says {tmp_path}/kept/a\)"
    ):
        find(tmp_path / "runs/a")


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("https://host/a", "https://host/a cannot be written to"),
        ("ftp://host/a", "has scheme ftp: allowed are"),
        ("s3://me:secret@bucket/a", "s3://bucket/a has a user or password"),
        ("pipe:cat", "would run a command"),
    ],
)
def test_a_place_that_cannot_hold_checkpoints_is_refused_without_its_secrets(
    tmp_path: Path, text_data: Path, place: str, words: str
) -> None:
    path = write_run(tmp_path, text_data, checkpoint__dir=place)
    with pytest.raises(ConfigError, match=words) as caught:
        train(path)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("every", "evaluated"), [(None, 6), (6, 0), (5, 2)])
def test_the_best_cannot_be_kept_where_what_is_saved_is_not_evaluated(
    tmp_path: Path, text_data: Path, every: int | None, evaluated: int
) -> None:
    path = write_run(
        tmp_path, text_data, checkpoint__every=every, checkpoint__keep={"best": 1}, train__eval_every=evaluated
    )
    with pytest.raises(ConfigError, match=r"keep.best=1 goes by the held-out loss .* is no multiple of"):
        train(path)
