"""Saving and taking up, in one process and with real ranks."""

import errno
import json
import os
import threading

import pytest
import torch
import torch.distributed as dist

from megatrain.base.errors import CheckpointError, FailedCheckpointError
from megatrain.checkpoint.checkpoints import Checkpoints
from megatrain.checkpoint.config import Keep
from megatrain.checkpoint.read import find, only_weights
from megatrain.checkpoint.storage import LocalStorage
from megatrain.parallel.mesh import Mesh
from tests.checkpoint.toy import Spec, Toy, full_tensors
from tests.ranks import run

FACTS = {"config": {"seed": 0}, "tokenizer": "abc", "lineage": []}


def save(checkpoints: Checkpoints, step: int, toy: Toy | None = None, **options) -> None:
    checkpoints.save(
        step, (toy or Toy(full_tensors())).slices(), {"step": step, "tokens": step * 100}, FACTS, **options
    )


def steps(checkpoints: Checkpoints) -> list[int]:
    return [commit.step for commit in checkpoints.commits()]


def test_what_was_saved_is_found_with_its_state_and_facts(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.newest() is None
    save(checkpoints, 100)
    checkpoints.close()
    reader = Checkpoints(tmp_path / "checkpoints").newest().reader()
    assert (reader.step, reader.state) == (100, {"step": 100, "tokens": 10_000})
    assert reader.facts["tokenizer"] == "abc"
    assert reader.facts["origin"]["versions"]["torch"] == torch.__version__
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000100\n"
    assert find(tmp_path).digest == find(tmp_path / "checkpoints" / "step-00000100").digest


def test_values_changed_after_an_asynchronous_save_returns_are_not_what_is_saved(tmp_path):
    changed = threading.Event()
    full = full_tensors()
    toy = Toy(full)
    checkpoints = Checkpoints(tmp_path, fault=lambda point: point == "before the files" and changed.wait(60))
    state = {"cursors": [1, 2]}
    checkpoints.save(1, toy.slices(), state, FACTS)
    for values in toy.tensors.values():
        values.fill_(7)
    state["cursors"].append(3)
    changed.set()
    checkpoints.wait()
    reader = checkpoints.newest().reader()
    assert all(torch.equal(reader.read_full(name, of), values) for (of, name), values in full.items())
    assert reader.state == {"cursors": [1, 2]}


def test_a_save_that_hangs_is_said_again_and_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("megatrain.checkpoint.checkpoints.PATIENCE_SECONDS", 0.01)
    said, stuck = threading.Event(), threading.Event()
    monkeypatch.setattr("megatrain.checkpoint.checkpoints.warn", lambda words, waited: said.set())
    checkpoints = Checkpoints(tmp_path, fault=lambda point: stuck.wait() if point == "before the files" else None)
    save(checkpoints, 1)
    waiting = threading.Thread(target=checkpoints.wait)
    waiting.start()
    assert said.wait(timeout=60)
    assert steps(checkpoints) == []
    stuck.set()
    waiting.join()
    assert steps(checkpoints) == [1]


def test_memory_that_was_reserved_serves_every_save(tmp_path):
    """Taking memory, and above all touching it for the first time, is as slow as copying into it."""
    checkpoints, toy = Checkpoints(tmp_path), Toy(full_tensors())
    checkpoints.reserve(toy.slices())
    place = checkpoints._copy._buffer.data_ptr()
    for step in (1, 2):
        save(checkpoints, step, toy)
        assert checkpoints._copy._buffer.data_ptr() == place
    checkpoints.wait()
    assert checkpoints._copy.bytes == checkpoints._copy._buffer.numel()


def test_a_save_waits_for_the_one_before_it(tmp_path):
    passed = []
    checkpoints = Checkpoints(tmp_path, fault=passed.append)
    save(checkpoints, 1)
    save(checkpoints, 2)
    checkpoints.wait()
    first = passed.index("after the rename")
    assert passed.count("before the copy") == 2
    assert passed.index("before the copy", 1) > first
    assert steps(checkpoints) == [1, 2]


def refuse(number: int, at: str):
    def fault(point: str) -> None:
        if point == at:
            raise OSError(number, os.strerror(number))

    return fault


@pytest.mark.parametrize("at", ["in the middle of a file", "after the manifest", "after COMMIT"])
def test_the_error_of_a_failed_write_comes_with_the_next_save_and_leaves_nothing(at, tmp_path):
    save(Checkpoints(tmp_path), 1, asynchronous=False)
    checkpoints = Checkpoints(tmp_path, fault=refuse(errno.EIO, at))
    save(checkpoints, 2)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save(checkpoints, 3)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001"]
    checkpoints.wait()  # it was told once
    save(checkpoints, 4)
    with pytest.raises(CheckpointError, match="Input/output error"):
        checkpoints.close()


def test_a_full_disk_is_told_with_bytes_and_training_may_go_on(tmp_path, caplog):
    save(Checkpoints(tmp_path), 1, asynchronous=False)
    checkpoints = Checkpoints(tmp_path, go_on=True, fault=refuse(errno.ENOSPC, "in the middle of a file"))
    save(checkpoints, 2)
    save(checkpoints, 3, asynchronous=False)
    needed = sum(x.numel() * 4 for x in full_tensors().values())
    assert len(checkpoints.failures) == 2
    assert f"{needed} bytes are needed and " in checkpoints.failures[0]
    assert checkpoints.failures[0].endswith("free; make room")
    assert "step 3 was not saved (checkpoint.failed_save=go_on): no room" in caplog.text
    assert steps(checkpoints) == [1]
    with pytest.raises(FailedCheckpointError, match=r"step 3 is lost, its checkpoint was not saved: no room"):
        checkpoints.require(3)


def test_a_step_is_told_once_it_is_a_commit_and_not_before(tmp_path):
    told = []
    fault = refuse(errno.EIO, "after COMMIT")
    checkpoints = Checkpoints(tmp_path, go_on=True, committed=told.append)
    save(checkpoints, 1)
    checkpoints.wait()
    checkpoints.require(1)
    assert told == [1]
    failing = Checkpoints(tmp_path, go_on=True, committed=told.append, fault=fault)
    save(failing, 2, asynchronous=False)
    assert told == [1]


@pytest.mark.parametrize(("last", "advised"), [(2, False), (4, True)])
def test_fewer_commits_are_advised_where_some_may_go(last, advised, tmp_path):
    for step in (1, 2, 3):
        save(Checkpoints(tmp_path), step, asynchronous=False)
    full = Checkpoints(tmp_path, keep=Keep(last=last), fault=refuse(errno.ENOSPC, "in the middle of a file"))
    with pytest.raises(CheckpointError) as told:
        save(full, 4, asynchronous=False)
    assert ("lower checkpoint.keep.last" in str(told.value)) is advised


def test_a_save_that_cannot_fit_is_refused_before_anything_is_written(tmp_path):
    class Small(LocalStorage):
        def free_bytes(self):
            return 100

    checkpoints = Checkpoints(Small(tmp_path))
    with pytest.raises(CheckpointError, match="bytes are needed and 100 are free"):
        save(checkpoints, 1, asynchronous=False)
    assert os.listdir(tmp_path) == []


def test_the_last_and_every_kth_are_kept_and_what_is_deleted_loses_its_name_first(tmp_path):
    seen = []
    checkpoints = Checkpoints(
        tmp_path, keep=Keep(last=2, every=3), fault=lambda p: seen.append((p, steps(checkpoints)))
    )
    for step in range(1, 9):
        save(checkpoints, step, asynchronous=False)
    assert steps(checkpoints) == [3, 6, 7, 8]
    assert all(len(whole) >= 3 for point, whole in seen if point == "before a deletion")


def test_the_best_by_held_out_loss_are_kept_beside_the_last():
    keep = Keep(last=2, best=2)
    scores = {1: 2.0, 2: None, 3: 1.0, 4: 2.0, 5: 3.0, 6: None, 7: 4.0}
    assert keep.superfluous(scores) == [2, 4, 5]  # 1 was as good as 4, and earlier
    assert Keep(last=2).superfluous(scores) == [1, 2, 3, 4, 5]
    assert Keep(best=-1).problems() == ["best=-1: it counts commits, so 0 or more"]


def test_scores_live_in_the_commits_so_a_resumed_run_keeps_the_best_as_well(tmp_path):
    for step, score in enumerate([5.0, 1.0, None, 4.0, 3.0, 6.0], 1):
        checkpoints = Checkpoints(tmp_path, keep=Keep(last=2, best=1))  # another job for each
        checkpoints.save(step, Toy(full_tensors()).slices(), {}, {"score": score}, asynchronous=False)
    assert steps(checkpoints) == [2, 5, 6]


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, asynchronous=False)
    other = full_tensors(seed=1)
    save(checkpoints, 1, Toy(other), asynchronous=False)
    found = checkpoints.newest().reader().read_full("embedding.weight")
    assert torch.equal(found, other["weights", "embedding.weight"])
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001"]


def test_between_the_two_renames_of_a_replacement_the_old_one_is_found(tmp_path):
    save(Checkpoints(tmp_path), 1, asynchronous=False)
    os.rename(tmp_path / "step-00000001", tmp_path / ".step-00000001.replaced")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.newest().step == 1
    save(checkpoints, 2, asynchronous=False)
    assert steps(checkpoints) == [1, 2]


def test_a_rank_that_outlived_its_job_cannot_write_into_the_next_save(tmp_path):
    """The job's rank 0 was killed and the next job is saving the same step while a rank of the first still writes."""
    storage = LocalStorage(tmp_path)
    old = storage.staging("step-00000001")
    storage.prepare(old)

    def outlive(point: str) -> None:
        if point == "before the files":
            with pytest.raises(FileNotFoundError):
                storage.write(f"{old}/rank-00000-000.safetensors", [b"old"])

    save(Checkpoints(tmp_path, fault=outlive), 1, asynchronous=False)
    assert Checkpoints(tmp_path).newest().step == 1


@pytest.mark.parametrize("latest", ["", "step-99999999\n", "\xff\xfe", "step-00000001\n\n\n", "../elsewhere"])
def test_the_hint_is_never_trusted(latest, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        save(checkpoints, step, asynchronous=False)
    (tmp_path / "latest").write_text(latest, encoding="latin-1")
    assert checkpoints.newest().step == 2
    (tmp_path / "latest").unlink()
    assert checkpoints.newest().step == 2


def test_a_folder_without_commit_is_not_taken_and_said(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        save(checkpoints, step, asynchronous=False)
    (tmp_path / "step-00000002" / "COMMIT").unlink()
    assert checkpoints.newest().step == 1
    assert "step-00000002 has no COMMIT and is not taken" in caplog.text


def test_a_damaged_one_is_refused_and_the_one_before_taken_when_told(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        save(checkpoints, step, asynchronous=False)
    file = tmp_path / "step-00000002" / "rank-00000-000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{file} is damaged: \w+/.* has digest \w+ and was written with \w+"):
        checkpoints.newest()
    assert checkpoints.newest(fallback=True).step == 1
    with pytest.raises(CheckpointError, match="is damaged"):
        find(tmp_path / "step-00000002")


def test_a_commit_of_another_run_is_refused(tmp_path):
    for name in ("a", "b"):
        checkpoints = Checkpoints(tmp_path / name / "checkpoints")
        checkpoints.claim(tmp_path / name)
        save(checkpoints, 1 if name == "a" else 2)
        checkpoints.close()
    os.rename(tmp_path / "b/checkpoints/step-00000002", tmp_path / "a/checkpoints/step-00000002")
    checkpoints = Checkpoints(tmp_path / "a" / "checkpoints")
    checkpoints.claim(tmp_path / "a")
    with pytest.raises(CheckpointError, match="belongs to another run"):
        checkpoints.newest()
    assert checkpoints.newest(fallback=True).step == 1
    checkpoints.close()


def test_a_model_that_differs_is_refused_with_all_names_before_anything_is_loaded(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, asynchronous=False)
    other = Toy(specs=(Spec("embedding.weight", (13, 4), 0), Spec("layers.0.norm.bias", (4,))))
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(checkpoints.newest().reader(), other)
    assert "1 weights of the model are not in it: layers.0.norm.bias" in str(caught.value)
    assert "5 of its weights are not in the model" in str(caught.value)
    assert "embedding.weight [12, 4] in it, [13, 4] in the model" in str(caught.value)
    assert all(torch.isnan(values).all() for values in other.tensors.values())


def test_tensors_that_the_run_does_not_take_are_refused(tmp_path):
    class OnlyWeights(Toy):
        def slices(self):
            return (s for s in super().slices() if s.state == "weights")

    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, asynchronous=False)
    reader = checkpoints.newest().reader()
    with pytest.raises(CheckpointError, match="holds 12 tensors that this run does not take"):
        checkpoints.load(reader, OnlyWeights())
    checkpoints.load(reader, OnlyWeights(), states=lambda state: state == "weights")


def test_keep_below_two_is_refused():
    assert "at least 2" in Keep(last=1).problems()[0]


# ------------------------------------------------------------------------------------------------ real ranks


def toy_of(mesh: Mesh, full=None, zero: bool = True) -> Toy:
    tp, dp = mesh.axis("tp"), mesh.axis("dp")
    return Toy(full, (tp.rank, tp.size), (dp.rank, dp.size), zero)


def save_and_load(folder: str, tp: int, dp: int) -> list:
    mesh = Mesh.of(tp=tp, dp=dp).at(dist.get_rank()).connect()
    checkpoints = Checkpoints(folder, mesh.axis("world"))
    commit = checkpoints.newest()
    if commit is None:
        save(checkpoints, 5, toy_of(mesh, full_tensors()))
        checkpoints.close()
        return []
    found, wanted = toy_of(mesh), toy_of(mesh, full_tensors())
    checkpoints.load(commit.reader(), found)
    assert checkpoints.open(folder, only_weights).digest == commit.digest
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoints.open(f"{folder}/nowhere", only_weights)
    checkpoints.close()
    pairs = zip(found.slices(), wanted.slices(), strict=True)
    return [commit.reader().state, all(torch.equal(a.values, b.values) for a, b in pairs)]


def test_four_ranks_save_and_two_and_one_load(tmp_path):
    run(save_and_load, 4, str(tmp_path), 2, 2)
    assert len(list((tmp_path / "step-00000005").glob("rank-*"))) == 4
    expected = [{"step": 5, "tokens": 500}, True]
    assert run(save_and_load, 2, str(tmp_path), 1, 2) == [expected] * 2
    toy, reader = Toy(), find(tmp_path).reader()
    toy.load(reader.fill)
    assert all(torch.equal(toy.tensors[key], values) for key, values in full_tensors().items())


def errors_of_ranks(folder: str) -> list[str]:
    """What each rank is told when rank 1's disk fails, then when its view of the folder is another one."""
    mesh = Mesh.of(dp=2).at(dist.get_rank()).connect()
    told = []
    fault = refuse(errno.EIO, "in the middle of a file") if mesh.rank == 1 else lambda point: None
    checkpoints = Checkpoints(folder, mesh.axis("world"), fault=fault)
    save(checkpoints, 1, toy_of(mesh, full_tensors()))
    for attempt in range(2):
        try:
            checkpoints.wait() if attempt == 0 else checkpoints.close()
        except CheckpointError as error:
            told.append(str(error))
    elsewhere = Checkpoints(f"{folder}/{mesh.rank}", mesh.axis("world"))
    alone = Checkpoints(f"{folder}/{mesh.rank}")
    save(alone, 1 + mesh.rank, asynchronous=False)
    try:
        elsewhere.newest()
    except CheckpointError as error:
        told.append(str(error))
    return told


def test_every_rank_is_told_what_failed_on_one(tmp_path):
    told = run(errors_of_ranks, 2, str(tmp_path))
    assert told[0] == told[1]
    assert len(told[0]) == 2
    assert "writing rank 1's part of a checkpoint failed" in told[0][0]
    assert "step-00000001 has no COMMIT" in told[0][1]
    assert not [name for name in os.listdir(tmp_path) if "step" in name]


def test_the_manifest_is_json_that_says_what_is_where(tmp_path):
    save(Checkpoints(tmp_path), 1, asynchronous=False)
    manifest = json.loads((tmp_path / "step-00000001" / "manifest.json").read_text())
    assert manifest["tensors"]["weights"]["embedding.weight"]["shape"] == [12, 4]
    assert manifest["facts"]["config"] == {"seed": 0}
