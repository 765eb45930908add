"""Token shards: what is written is read, by us and by webdataset."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import webdataset

from megatrain.base.errors import DataError
from megatrain.data.manifest import HELD_OUT, TRAIN, Manifest, Split, TokenizerEntry, token_dtype
from megatrain.data.shards import Shard, ShardWriter


@pytest.fixture(params=["uint16", "uint32"])
def written(tmp_path, request):
    rng = np.random.default_rng(0)
    documents = {f"../books\n/{i}é": rng.integers(0, 60_000, size=n) for i, n in enumerate([1, 255, 256, 257, 3000])}
    with ShardWriter(tmp_path, TRAIN, 7, request.param) as writer:
        for i, (name, tokens) in enumerate(documents.items()):
            writer.write(name, tokens, text_bytes=3 * len(tokens), metadata={"n": i} if i % 2 else None)
    return tmp_path, writer.entry, documents, request.param


def test_documents_are_read_back_by_number(written):
    folder, entry, documents, dtype = written
    shard = Shard.of(folder, entry, dtype)
    assert entry.documents == len(documents)
    assert entry.tokens == sum(map(len, documents.values()))
    for i, (name, tokens) in enumerate(documents.items()):
        assert shard.document_id(i) == name
        assert shard.tokens(i).tolist() == tokens.tolist()
        assert not shard.damaged(i)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its file open
def test_webdataset_reads_the_same_documents(written):
    folder, entry, documents, dtype = written
    samples = list(webdataset.WebDataset(str(folder / entry.path), shardshuffle=False, empty_check=False))
    assert [np.frombuffer(s["tokens"], np.dtype(dtype)).tolist() for s in samples] == [
        d.tolist() for d in documents.values()
    ]
    assert json.loads(samples[1]["json"]) == {"n": 1}


def test_manifest_digests_are_those_of_the_files(written):
    folder, entry, _, _ = written
    assert hashlib.sha256((folder / entry.path).read_bytes()).hexdigest() == entry.sha256
    assert hashlib.sha256((folder / entry.index).read_bytes()).hexdigest() == entry.index_sha256
    assert (folder / entry.path).stat().st_size == entry.bytes
    assert sorted(p.suffix for p in (folder / TRAIN).iterdir()) == [".index", ".tar"]


def test_the_same_documents_give_the_same_bytes(tmp_path):
    def entry(folder):
        with ShardWriter(folder, TRAIN, 0, "uint16") as writer:
            writer.write("a", np.arange(5), 5)
        return writer.entry

    assert entry(tmp_path / "1") == entry(tmp_path / "2")


def test_a_failing_writer_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="fit uint16"), ShardWriter(tmp_path, TRAIN, 0, "uint16") as writer:
        writer.write("a", np.array([70_000]), 5)
    assert list((tmp_path / TRAIN).iterdir()) == []


def test_a_flipped_bit_is_found_at_its_document(written):
    folder, entry, _, dtype = written
    offset = int(Shard.of(folder, entry, dtype).column("offset")[2])
    data = bytearray((folder / entry.path).read_bytes())
    data[offset + 10] ^= 4
    (folder / entry.path).write_bytes(data)
    shard = Shard.of(folder, entry, dtype)
    assert [shard.damaged(i) for i in range(entry.documents)] == [False, False, True, False, False]


def test_a_truncated_or_missing_shard_is_refused_by_name(written):
    folder, entry, _, dtype = written
    (folder / entry.path).write_bytes((folder / entry.path).read_bytes()[:-512])
    with pytest.raises(DataError, match=r"shard-000007.tar has \d+ bytes and the manifest says"):
        Shard.of(folder, entry, dtype).tokens(0)
    (folder / entry.path).unlink()
    with pytest.raises(DataError, match=r"shard-000007.tar is missing"):
        Shard.of(folder, entry, dtype).tokens(0)
    (folder / entry.index).write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"index .*shard-000007.index is not the one that was written"):
        Shard.of(folder, entry, dtype).length  # noqa: B018
    (folder / entry.index).unlink()
    with pytest.raises(DataError, match=r"index .*shard-000007.index cannot be read"):
        Shard.of(folder, entry, dtype).length  # noqa: B018


def manifest_of(entry, dtype):
    return Manifest("books", TokenizerEntry("f" * 64, 60_000, 0), dtype, {TRAIN: Split((entry,)), HELD_OUT: Split()})


def test_a_manifest_is_read_as_written(written):
    folder, entry, documents, dtype = written
    manifest = manifest_of(entry, dtype)
    manifest.write(folder)
    assert Manifest.read(folder) == manifest
    split = json.loads((folder / "manifest.json").read_text())["splits"][TRAIN]
    assert split["tokens"] == sum(map(len, documents.values()))
    assert split["text_bytes"] == 3 * split["tokens"]


def test_bad_folders_are_refused_with_what_to_do(tmp_path, written):
    with pytest.raises(DataError, match="is no folder"):
        Manifest.read(tmp_path / "absent")
    with pytest.raises(DataError, match="megatrain data build"):
        Manifest.read(tmp_path)
    _, entry, _, dtype = written
    good = manifest_of(entry, dtype).as_json()
    for change, message in (
        ({"version": 2}, "version 2"),
        ({"dtype": "int8"}, "int8"),
        ({"splits": {"train": {}}}, "not a manifest"),
    ):
        (tmp_path / "manifest.json").write_text(json.dumps(good | change))
        with pytest.raises(DataError, match=message):
            Manifest.read(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        Manifest.read(tmp_path)


def test_paths_that_lead_out_of_the_folder_are_refused(written):
    folder, entry, _, dtype = written
    for change in ({"path": "../x"}, {"index": "/etc/passwd"}, {"path": "train/../../x"}):
        with pytest.raises(DataError, match="outside its folder"):
            Shard.of(folder, dataclasses.replace(entry, **change), dtype)


def test_the_narrowest_type_is_chosen():
    assert [token_dtype(n) for n in (2, 65_536, 65_537)] == ["uint16", "uint16", "uint32"]
