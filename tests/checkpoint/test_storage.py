"""One contract for every kind of storage, and what a real full disk does."""

import contextlib
import subprocess
import uuid
from pathlib import Path

import fsspec
import pytest
import torch

from megatrain.base.errors import CheckpointError
from megatrain.checkpoint.checkpoints import Checkpoints
from megatrain.checkpoint.config import Keep
from megatrain.checkpoint.read import find
from megatrain.checkpoint.remote import RemoteStorage, open_storage
from megatrain.checkpoint.storage import LocalStorage
from tests.checkpoint.toy import Spec, Toy, full_tensors


@pytest.fixture(params=["local", "memory", "s3"])
def place(request, tmp_path):
    if request.param == "s3":
        bucket = request.getfixturevalue("object_store").upload(tmp_path, f"bucket-{uuid.uuid4().hex[:8]}", "run")
        yield f"{bucket}/checkpoints"
    else:
        yield str(tmp_path / "checkpoints") if request.param == "local" else "memory://bucket/run/checkpoints"
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]


def save(checkpoints: Checkpoints, step: int, seed: int = 0) -> None:
    checkpoints.save(step, Toy(full_tensors(seed=seed)).slices(), {"step": step}, {}, asynchronous=False)


def test_files_are_read_as_they_were_written(place):
    storage = open_storage(place)
    assert storage.folders() == []
    assert storage.size("a/x") is None
    storage.prepare("a")
    storage.write("a/x", [b"0123", memoryview(b"4567"), bytearray(b"89")])
    assert storage.size("a/x") == 10
    assert storage.folders() == ["a"]
    assert [bytes(storage.read("a/x", *r)) for r in [(0, 10), (3, 5), (8, 99), (4, 4)]] == [
        b"0123456789",
        b"34",
        b"89",
        b"",
    ]
    storage.hint("latest", b"one")
    storage.hint("latest", b"two")
    assert bytes(storage.read("latest", 0, 99)) == b"two"
    storage.write("a/COMMIT", [b""])
    storage.delete("a", "COMMIT")
    assert storage.folders() == []


def test_a_write_that_fails_leaves_no_whole_file(place):
    def chunks():
        yield b"0123"
        raise OSError("the cause")

    storage = open_storage(place)
    storage.prepare("a")
    with pytest.raises(OSError, match="the cause"):
        storage.write("a/x", chunks())
    assert storage.size("a/x") in (None, 0, 4)


def test_saving_finding_and_keeping(place):
    checkpoints = Checkpoints(place, keep=Keep(last=2))
    assert checkpoints.newest() is None
    for step in (1, 2, 3, 3):
        save(checkpoints, step, seed=step)
    assert [c.step for c in checkpoints.commits()] == [2, 3]
    reader = find(place).reader()
    full = full_tensors(seed=3)
    assert all(torch.equal(reader.read_full(name, state), values) for (state, name), values in full.items())
    assert find(f"{place}/step-00000002").step == 2
    assert find(place.removesuffix("/checkpoints")).step == 3
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find(f"{place}/elsewhere")


def test_a_save_that_was_cut_off_is_not_taken_and_the_next_one_passes(place):
    storage = open_storage(place)
    checkpoints = Checkpoints(storage)
    save(checkpoints, 1)
    for point in ("in the middle of a file", "after the manifest"):

        def fault(at, point=point):
            if at == point:
                raise KeyboardInterrupt  # nothing of ours cleans up after it

        with pytest.raises(KeyboardInterrupt):
            save(Checkpoints(storage, fault=fault), 2)
        assert checkpoints.newest().step == 1
    save(checkpoints, 2)
    assert checkpoints.newest().step == 2
    assert sorted(storage.folders()) == ["step-00000001", "step-00000002"]


def test_an_unknown_kind_of_url_is_refused_in_words():
    with pytest.raises(CheckpointError, match="nonsense://a cannot be opened"):
        open_storage("nonsense://a")


def test_errors_of_a_client_become_a_sentence(monkeypatch):
    storage = RemoteStorage("memory://bucket")

    def refuse(*args, **options):
        raise RuntimeError("no credentials")

    monkeypatch.setattr(storage._fs, "open", refuse)
    with pytest.raises(CheckpointError, match="RuntimeError: no credentials"):
        save(Checkpoints(storage), 1)


def test_blocks_of_a_remote_file_are_read_one_at_a_time(monkeypatch, tmp_path):
    """A tensor larger than a block arrives whole, by rows, by columns of a long row, and in part."""
    from megatrain.checkpoint import read

    monkeypatch.setattr(read, "BLOCK_BYTES", 64)
    for shape, dim in (((9, 8), 1), ((100,), 0), ((2, 50), 1)):
        full = {(s, "x"): torch.randn(shape) for s in ("weights", "exp_avg", "exp_avg_sq")}
        specs = (Spec("x", shape, dim),)
        place = f"memory://bucket/{len(shape)}-{shape[0]}"
        checkpoints = Checkpoints(place)
        checkpoints.save(1, Toy(full, specs=specs).slices(), {}, {}, asynchronous=False)
        reader = checkpoints.newest().reader()
        assert torch.equal(reader.read_full("x"), full["weights", "x"])
        wanted, found = (Toy(of, tp=(1, 2), dp=(1, 3), zero=True, specs=specs) for of in (full, None))
        found.load(reader.fill)
        pairs = zip(found.slices(), wanted.slices(), strict=True)
        assert all(torch.equal(a.values, b.values) for a, b in pairs)
    fsspec.filesystem("memory").store.clear()


def test_bytes_on_disk_are_within_2_percent_of_the_tensors(memory_path):
    specs = tuple(Spec(f"layers.{i}.weight", (256, 256), 0) for i in range(12))
    full = full_tensors(specs)
    checkpoints = Checkpoints(memory_path)
    checkpoints.save(1, Toy(full, specs=specs).slices(), {}, {"config": {}}, asynchronous=False)
    written = sum(file.stat().st_size for file in (memory_path / "step-00000001").iterdir())
    tensors = sum(x.numel() * x.element_size() for x in full.values())
    assert tensors < written < 1.02 * tensors


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    """A file system of its own; the test is skipped where this process may not mount one."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small file system needs privileges")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("point", ["before the files", "after the files"])
def test_a_disk_that_fills_up_leaves_the_commit_before_and_room_for_the_next(point, tmp_path):
    specs = (Spec("x", (256, 256), 0),)  # 768 KiB with its moments
    toy = Toy(full_tensors(specs), specs=specs)
    disk = tmp_path / "disk"
    with small_disk(disk, "2m"):
        filler = disk / "filler"

        def fill(at: str) -> None:
            if at == point and steps == 2:
                with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
                    while file.write(bytes(4096)):
                        pass

        checkpoints = Checkpoints(disk / "checkpoints", fault=fill)
        for steps in (1, 2):
            checkpoints.save(steps, toy.slices(), {}, {})
            if steps == 1:
                checkpoints.wait()
        with pytest.raises(
            CheckpointError, match=r"no room for a checkpoint in .*: \w+ bytes are needed and 0 are free"
        ):
            checkpoints.wait()
        assert checkpoints.newest().step == 1
        assert not [p for p in (disk / "checkpoints").iterdir() if p.name.startswith(".step")]
        filler.unlink()
        steps = 3
        checkpoints.save(3, toy.slices(), {}, {}, asynchronous=False)
        assert checkpoints.newest().step == 3


def test_a_folder_that_may_not_be_written_is_refused_in_words(tmp_path, monkeypatch):
    def refuse(self, staging):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(LocalStorage, "prepare", refuse)
    with pytest.raises(CheckpointError, match="may not be written to"):
        save(Checkpoints(tmp_path), 1)


@pytest.mark.parametrize("name", ["with blanks and ünïcödé", "x" * 255])
def test_names_that_file_systems_allow_work(name, tmp_path):
    save(Checkpoints(tmp_path / name), 1)
    (tmp_path / "link").symlink_to(tmp_path / name)
    assert find(tmp_path / "link").step == 1
