"""A run and its data: manifests are read once, raw text trains and resumes as shards do, the ledger is remembered."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import megatrain
from megatrain.base.device import Device
from megatrain.base.errors import DataError
from megatrain.data.feed import Feed, tensors_of
from megatrain.data.ledger import FILE, Ledger
from megatrain.data.manifest import MANIFEST, Manifest
from megatrain.data.rows import empty
from megatrain.data.seen import seen
from megatrain.data.text_index import IndexOptions, index
from megatrain.train.run import read_run, train
from tests.ranks import RankError, run
from tests.train.small import metrics, on_ranks, write_run


@pytest.fixture(scope="module")
def raw_text(tmp_path_factory: pytest.TempPathFactory, text_data: Path) -> Path:
    """This package's own source code as JSON lines, with the tokenizer of `text_data`."""
    folder = tmp_path_factory.mktemp("raw") / "source"
    folder.mkdir()
    source = Path(megatrain.__file__).parent
    for part in ("base", "nn"):
        lines = [json.dumps({"text": path.read_text()}) for path in sorted((source / part).glob("*.py"))]
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    index(IndexOptions(folder, text_data / "tokenizer.json", held_out=0.2))
    return folder


SMALL = {"model__d_model": 16, "model__n_layers": 1, "train__eval_every": 0, "train__steps": 4, "checkpoint__every": 2}


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder)]


def test_raw_text_trains_and_goes_on_elsewhere_as_if_nothing_had_been(tmp_path: Path, raw_text: Path) -> None:
    path = str(write_run(tmp_path, raw_text, checkpoint__async=False, **SMALL))
    train(Path(path), ["name=straight"])
    with pytest.raises(RankError, match="exit code -9"):
        run(on_ranks, 2, path, ("name=killed", "layout.engine=plain"), (1, 3))
    train(Path(path), ["name=killed", "layout.engine=plain", "data.workers=1"])
    straight, killed = tmp_path / "runs/straight", tmp_path / "runs/killed"
    assert losses(killed) == pytest.approx(losses(straight), rel=1e-5)
    ledgers = [Ledger(folder / FILE) for folder in (straight, killed)]
    assert ledgers[0].lines[-1]["digest"] == ledgers[1].lines[-1]["digest"]  # every slot stands at the same byte
    (found,) = seen(killed, document="base.jsonl:1")
    assert found.steps == seen(straight, document="base.jsonl:1")[0].steps


def test_manifests_are_read_once_by_a_run(tmp_path: Path, text_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, original = [], Manifest.read
    monkeypatch.setattr(Manifest, "read", lambda folder: read.append(folder) or original(folder))
    train(write_run(tmp_path, text_data, **SMALL), [])
    assert read == [text_data]


def test_workers_are_handed_the_manifests(tmp_path: Path, text_data: Path) -> None:
    shutil.copytree(text_data, tmp_path / "data")
    data = read_run(write_run(tmp_path, tmp_path / "data"), ["data.workers=1"]).run.data
    with Feed.open(data, seed=0, global_batch=8) as feed:
        expected = next(feed).tokens
        (tmp_path / "data" / MANIFEST).unlink()
        feed.seek(None)
        assert torch.equal(next(feed).tokens, expected)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text_data: Path) -> Path:
    """A run that was stopped after its second checkpoint."""
    folder = tmp_path_factory.mktemp("finished")
    train(write_run(folder, text_data, **SMALL), ["name=a", "checkpoint.async=false"])
    return folder


@pytest.mark.parametrize("change", ["cut", "exchanged", "gone"])
def test_a_resume_knows_the_ledger_of_its_checkpoint(
    tmp_path: Path, text_data: Path, finished: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(finished / "runs", tmp_path / "runs")
    folder = tmp_path / "runs/a"
    shutil.rmtree(folder / "checkpoints/step-00000004")
    lines = (folder / FILE).read_bytes().splitlines(keepends=True)
    assert len(lines) == 3  # the order, and the steps up to each checkpoint
    if change == "cut":
        (folder / FILE).write_bytes(lines[0])
    else:
        (folder / FILE).unlink()
    if change == "exchanged":
        other = Ledger(folder / FILE)
        other.start(0, None, {"data": {}, "seed": 1, "global_batch": 8, "sources": []})
        other.trained(2, {"batches": 2, "sources": []})
    go_on = [write_run(tmp_path, text_data, **SMALL), ["name=a"]]
    if change == "gone":
        train(*go_on)
        assert Ledger(folder / FILE).last_step == 4
        return
    with pytest.raises(DataError, match=r"is not the ledger that the checkpoint knows \(it had 2 lines"):
        train(*go_on)


def test_batches_for_a_card_are_pinned_and_each_is_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU can show of it: a card asks for pinned memory, and each tensor goes there straight from the arrays."""
    assert Device("cuda").pins_memory
    assert not Device("cpu").pins_memory
    pinned, original = [], torch.empty_like

    def empty_like(tensor, pin_memory=False):  # this machine has no memory to pin
        pinned.append(pin_memory)
        return original(tensor)

    monkeypatch.setattr(torch, "empty_like", empty_like)
    arrays = empty(2, 8)
    for name, array in arrays.items():
        array[:] = len(name)
    tensors = tensors_of(arrays, pin_memory=True, copy=True)
    assert pinned == [True] * 5
    for name, tensor in tensors.items():
        assert (tensor == len(name)).all()
        arrays[name][:] = 0
        assert (tensor == len(name)).all()  # it is a copy: the worker may fill its buffer again
