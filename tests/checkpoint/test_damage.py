"""Damage to any file is found before a value reaches the model, the file named; nothing that is read is executed."""

import ast
import json
import os
import pickle
import random
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch

from megatrain.base.errors import CheckpointError
from megatrain.checkpoint import manifest as manifest_module
from megatrain.checkpoint.checkpoints import Checkpoints
from megatrain.checkpoint.manifest import decode, digest_of
from megatrain.checkpoint.read import Commit, find
from megatrain.checkpoint.storage import LocalStorage
from megatrain.checkpoint.tensorfile import decode_header, encode_header, header_length
from tests.checkpoint.toy import Spec, Toy, commit_of, full_tensors, ranks_of

SEED = 20_240_229


def flip(file: Path, r: random.Random, others: list[Path]) -> list[Path]:
    data = bytearray(file.read_bytes())
    data[r.randrange(len(data))] ^= 1 << r.randrange(8)
    file.write_bytes(data)
    return [file]


def truncate(file: Path, r: random.Random, others: list[Path]) -> list[Path]:
    os.truncate(file, r.randrange(file.stat().st_size))
    return [file]


def zero_fill(file: Path, r: random.Random, others: list[Path]) -> list[Path]:
    data = bytearray(file.read_bytes())
    begin = r.randrange(len(data))
    data[begin : begin + 64] = b"\xaa" * len(data[begin : begin + 64])
    file.write_bytes(data)
    return [file]


def append(file: Path, r: random.Random, others: list[Path]) -> list[Path]:
    file.write_bytes(file.read_bytes() + b"\0")
    return [file]


def swap(file: Path, r: random.Random, others: list[Path]) -> list[Path]:
    other = r.choice([o for o in others if o != file])
    mine, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(mine)
    return [file, other]


def delete(file: Path, r: random.Random, others: list[Path]) -> list[Path]:
    file.unlink()
    return [file]


def of_another_step(file: Path, r: random.Random, others: list[Path]) -> list[Path]:
    file.write_bytes((file.parent.parent / "step-00000001" / file.name).read_bytes())
    return [file]


def test_each_of_240_random_injuries_is_found_and_the_file_named(memory_path, caplog):
    """Flips, truncations, fills, swaps, deletions and files of another step, over all files of four ranks."""
    for step in (1, 2):
        commit_of(memory_path, ranks_of(full_tensors(seed=step), 2, 2, True), step, file_bytes=700)
    files = sorted((memory_path / "step-00000002").iterdir())
    whole = {file: file.read_bytes() for file in files}
    checkpoints = Checkpoints(memory_path)
    r = random.Random(SEED)
    for i in range(240):
        injure = [flip, flip, flip, truncate, zero_fill, append, swap, delete, of_another_step][i % 9]
        injured = injure(r.choice(files), r, files)
        said = f"seed {SEED}, injury {i}: {injure.__name__} of {[file.name for file in injured]}"
        caplog.clear()
        if injure is delete and injured[0].name == "COMMIT":
            # Without its marker it is no checkpoint; that is said, and the one before is the newest.
            assert checkpoints.newest().step == 1, said
            assert "step-00000002 has no COMMIT and is not taken" in caplog.text
        else:
            with pytest.raises(CheckpointError) as caught:
                checkpoints.newest()
            assert any(file.name in str(caught.value) for file in injured), said
            assert checkpoints.newest(fallback=True).step == 1, said
        for file, data in whole.items():
            file.write_bytes(data)
    assert checkpoints.newest().step == 2


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_ranks_share_the_checking_and_together_check_every_byte_once(size, tmp_path, monkeypatch):
    commit = commit_of(tmp_path, ranks_of(full_tensors(), 2, 2, True), file_bytes=700)
    checked: list[list[tuple[str, int, int]]] = [[] for _ in range(size)]
    digest = Commit._digest
    for rank in range(size):
        monkeypatch.setattr(
            Commit, "_digest", lambda self, *part, rank=rank: checked[rank].append(part) or digest(self, *part)
        )
        assert commit.damage(rank, size) == []
    spans = sorted(part for parts in checked for part in parts)
    for file in commit.manifest.files.values():
        mine = [(begin, end) for path, begin, end in spans if path.endswith(file.name) and begin < end]
        assert [begin for begin, _ in mine] == [0, *(end for _, end in mine[:-1])]
        assert mine[-1][1] == file.bytes
    total = sum(file.bytes for file in commit.manifest.files.values())
    largest = max(end - begin for _, begin, end in spans)
    assert max(sum(end - begin for _, begin, end in parts) for parts in checked) <= total / size + largest


def test_every_single_bit_of_a_small_commit_counts(memory_path):
    """All bits of the marker and of the tensors' file, one after the other."""
    full = {(s, "x"): torch.arange(3.0) for s in ("weights", "exp_avg", "exp_avg_sq")}
    commit_of(memory_path, [Toy(full, specs=(Spec("x", (3,)),))])
    folder = memory_path / "step-00000001"
    for file in (folder / "COMMIT", folder / "rank-00000-000.safetensors"):
        data = file.read_bytes()
        for bit in range(len(data) * 8):
            hurt = bytearray(data)
            hurt[bit // 8] ^= 1 << bit % 8
            file.write_bytes(hurt)
            with pytest.raises(CheckpointError):
                find(folder)
        file.write_bytes(data)
    find(folder)


# ------------------------------------------------------------------------------------------------ malice


class Payload:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_pickles_in_the_place_of_any_file_are_not_executed(tmp_path):
    canary = tmp_path / "canary"
    payloads = [pickle.dumps(Payload(f"touch {canary}"), protocol) for protocol in range(6)]
    torch.save(Payload(f"touch {canary}"), tmp_path / "payload.pt")
    payloads.append((tmp_path / "payload.pt").read_bytes())
    payloads.append(f"!!python/object/apply:os.system ['touch {canary}']\n".encode())
    commit_of(tmp_path, [Toy(full_tensors())])
    folder = tmp_path / "step-00000001"
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        for payload in payloads:
            file.write_bytes(payload)
            if file.name == "manifest.json":  # even one that was committed
                (folder / "COMMIT").write_text(digest_of(payload) + "\n")
            with pytest.raises(CheckpointError):
                find(folder)
        file.write_bytes(data)
        (folder / "COMMIT").write_text(digest_of((folder / "manifest.json").read_bytes()) + "\n")
    find(folder)
    assert not canary.exists()


def test_the_package_has_no_way_to_execute_what_it_reads():
    modules = {"pickle", "dill", "marshal", "shelve", "runpy"}
    calls = {"eval", "exec", "compile", "__import__", "torch.load", "numpy.load", "np.load", "yaml.load"}
    root = Path(manifest_module.__file__).parents[1]
    files = [*root.glob("checkpoint/**/*.py"), *root.glob("convert/**/*.py")]
    assert len(files) > 20
    files = [file for file in files if file.name != "pickled.py"]  # its unpickler knows tensors and calls nothing else
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            imported = {name.name for name in node.names} if isinstance(node, ast.Import) else set()
            imported |= {node.module} if isinstance(node, ast.ImportFrom) else set()
            assert not imported & modules, file
            assert not (isinstance(node, ast.Call) and ast.unparse(node.func) in calls), file


def header(table) -> bytes:
    return json.dumps(table).encode()


X = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

BOMBS = {
    "a shape whose product overflows": (header({"x": X | {"shape": [2**62, 2**62, 0]}}), 8),
    "a shape beyond 64 bits": (header({"x": X | {"shape": [2**64]}}), 8),
    "a huge shape": (header({"x": X | {"shape": [2**40], "data_offsets": [0, 2**42]}}), 8),
    "a negative shape": (header({"x": X | {"shape": [-2, -1]}}), 8),
    "a shape that is no count": (header({"x": X | {"shape": [2.0]}}), 8),
    "a shape of true": (header({"x": X | {"shape": [2, True]}}), 8),
    "offsets out of range": (header({"x": X | {"data_offsets": [8, 16]}}), 8),
    "offsets backwards": (header({"x": X | {"data_offsets": [8, 0]}}), 8),
    "overlapping offsets": (header({"x": X, "y": X | {"data_offsets": [4, 12]}}), 12),
    "a gap": (header({"x": X, "y": X | {"data_offsets": [12, 20]}}), 20),
    "bytes that belong to nothing": (header({"x": X}), 9),
    "the same bytes twice": (header({"x": X, "y": X}), 8),
    "a key twice": (b'{"x":' + header(X) + b',"x":' + header(X) + b"}", 8),
    "a dtype that lies": (header({"x": X | {"dtype": "F64"}}), 8),
    "an unknown dtype": (header({"x": X | {"dtype": "O"}}), 8),
    "a description with more": (header({"x": X | {"class": "os.system"}}), 8),
    "metadata that is no text": (header({"__metadata__": {"a": [1]}, "x": X}), 8),
    "a list": (b"[]", 0),
    "deep nesting": (b"[" * 100_000, 0),
    "deep nesting inside": (b'{"x":' * 50_000, 0),
    "not JSON": (b"\x80\x04\x95", 0),
    "not UTF-8": (b'{"\xff":1}', 0),
    "many dimensions": (header({"x": X | {"shape": [1] * 10_000 + [2]}}), 8),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_header_that_lies_is_refused_in_little_memory(name):
    text, data_bytes = BOMBS[name]
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="f is damaged"):
        decode_header(text, data_bytes, "f")
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**31, 2**60, 2**64 - 1])
def test_a_header_length_that_cannot_be_is_refused_before_it_is_read(length):
    with pytest.raises(CheckpointError, match=f"claims a header of {length} bytes"):
        header_length(struct.pack("<Q", length), 1000, "f")
    with pytest.raises(CheckpointError, match="cut off"):
        header_length(b"\0" * 7, 7, "f")


def test_a_good_header_comes_back_as_it_was():
    text = encode_header([], {"format": "pt"})
    assert decode_header(text[8:], 0, "f") == ({}, {"format": "pt"})


def test_a_huge_manifest_is_refused_unread(tmp_path):
    commit_of(tmp_path, [Toy(full_tensors())])
    os.truncate(tmp_path / "step-00000001" / "manifest.json", 2**30)  # a sparse file
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="at most"):
        Commit.open(LocalStorage(tmp_path), "step-00000001")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def edited(tmp_path: Path, edit) -> bytes:
    commit_of(tmp_path, [Toy(full_tensors())])
    value = json.loads((tmp_path / "step-00000001" / "manifest.json").read_text())
    edit(value)
    return json.dumps(value).encode()


def first_slice(value) -> list:
    return value["tensors"]["weights"]["embedding.weight"]["slices"][0]


def rename_file(value) -> None:
    value["files"]["../../elsewhere.safetensors"] = value["files"].pop("rank-00000-000.safetensors")


MANIFESTS = {
    "a newer version": (lambda v: v.update(version=99), "reads up to 1: use the version that wrote it"),
    "a version that is no number": (lambda v: v.update(version=True), "format version True"),
    "an unknown field": (lambda v: v.update(more=1), "its keys are"),
    "a missing field": (lambda v: v.pop("state"), "its keys are"),
    "another format": (lambda v: v.update(format="else"), "it is not a megatrain checkpoint"),
    "a path as a file's name": (rename_file, "no file name of a checkpoint"),
    "a slice outside of its file": (lambda v: first_slice(v).__setitem__(1, 2**40), "lies outside of"),
    "a slice in the header": (lambda v: first_slice(v).__setitem__(1, 0), "lies outside of"),
    "a slice over another": (lambda v: first_slice(v).__setitem__(1, first_slice(v)[1] + 4), "belong to no slice"),
    "a negative count": (lambda v: first_slice(v).__setitem__(3, -1), "not described by counts"),
    "a shape that is no matrix": (lambda v: v["tensors"]["weights"]["scale"].update(shape=[2**62, 4]), "has shape"),
    "an unknown dtype": (lambda v: v["tensors"]["weights"]["scale"].update(dtype="O"), "damaged: 'O'"),
    "tensors that are a list": (lambda v: v.update(tensors=[]), "damaged"),
    "a step that is no number": (lambda v: v.update(step="1"), "step or facts"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_lies_is_refused(name, tmp_path):
    edit, message = MANIFESTS[name]
    with pytest.raises(CheckpointError, match=message):
        decode(edited(tmp_path, edit), "manifest.json")
