"""Shards that are not as they were written: found at the document, or left out the same way each time."""

import itertools
import random
import shutil
import tarfile

import pytest
import torch

from megatrain.base.errors import DataError
from megatrain.data.config import Data, WeightedSource
from megatrain.data.feed import Feed
from megatrain.data.manifest import TRAIN, Manifest
from megatrain.data.shards import Shard
from tests.data.corpora import END, documents, write

N_BATCHES = 60  # more than an epoch


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sound") / "a", documents(120, seed=4), per_shard=40)


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "a")


def config(folder, **options):
    return Data(**({"sources": (WeightedSource(path=str(folder)),), "seq_len": 64, "workers": 0} | options))


def batches(folder, **options):
    with Feed.open(config(folder, **options), seed=0, global_batch=4) as feed:
        return list(itertools.islice(feed, N_BATCHES)), feed.skipped


def truncate_at_a_member(data):
    return data[: len(data) // 2 // 512 * 512]


def truncate_in_a_payload(data):
    return data[: len(data) // 2 + 77]


def append_garbage(data):
    return data + b"garbage"


def concatenate(data):
    return data + data


def zero_a_hole(data):
    middle = len(data) // 2
    return data[:middle] + bytes(4096) + data[middle + 4096 :]


def not_a_tar(data):
    return random.Random(0).randbytes(len(data))


def empty(data):
    return b""


CORRUPTIONS = [
    truncate_at_a_member, truncate_in_a_payload, append_garbage, concatenate, zero_a_hole, not_a_tar, empty,
]  # fmt: skip


@pytest.mark.parametrize("corrupt", CORRUPTIONS)
def test_every_corruption_is_found_at_its_shard(folder, corrupt):
    tar = folder / TRAIN / "shard-000001.tar"
    tar.write_bytes(corrupt(tar.read_bytes()))
    with pytest.raises(DataError, match=r"of .*shard-000001.tar is damaged"):
        batches(folder)


@pytest.mark.parametrize("corrupt", CORRUPTIONS)
def test_what_is_left_out_is_the_same_for_any_workers_and_after_a_resume(folder, sound, corrupt):
    tar = folder / TRAIN / "shard-000001.tar"
    tar.write_bytes(corrupt(tar.read_bytes()))
    whole, skipped = batches(folder, on_damage="skip")
    assert {t for t, _ in skipped} == {str(tar)}
    for healthy, batch in zip(batches(sound)[0], whole, strict=True):
        assert batch.cursors["tokens"] == healthy.cursors["tokens"]
        kept = batch.weights == 1
        assert torch.equal(batch.targets[kept], healthy.targets[kept])
        assert torch.equal(batch.tokens[kept], healthy.tokens[kept])
        assert torch.equal(batch.positions, healthy.positions)
        assert (batch.targets[~kept] == END).all()
    options = {"seed": 0, "global_batch": 4, "cursors": whole[20].cursors}
    with Feed.open(config(folder, on_damage="skip", workers=1), **options) as feed:
        for expected, batch in zip(whole[21:30], feed, strict=False):
            assert torch.equal(batch.tokens, expected.tokens)
            assert torch.equal(batch.weights, expected.weights)


def test_a_flipped_bit_costs_one_document(folder):
    manifest = Manifest.read(folder)
    entry = manifest.splits[TRAIN].shards[1]
    shard = Shard.of(folder, entry, manifest.dtype)
    data = bytearray((folder / entry.path).read_bytes())
    data[int(shard.column("offset")[5])] ^= 1
    (folder / entry.path).write_bytes(data)
    name = shard.document_id(5)
    with pytest.raises(DataError, match=f"document '{name}' of .* checksum"):
        batches(folder)
    found, skipped = batches(folder, on_damage="skip")
    lost = sum(int((batch.weights == 0).sum()) for batch in found)
    assert skipped == {(str(folder / entry.path), name): lost}
    assert lost >= shard.length[5]


def test_a_changed_index_is_refused_even_where_damage_is_skipped(folder):
    index = folder / TRAIN / "shard-000001.index"
    index.write_bytes(index.read_bytes()[:-1] + b"\0")
    with pytest.raises(DataError, match=r"shard-000001.index is not the one that was written"):
        batches(folder, on_damage="skip")


def test_hostile_members_are_never_looked_at(folder, tmp_path):
    """A shard may hold links, devices and programs: training reads ranges of bytes that the index names."""
    tar = folder / TRAIN / "shard-000001.tar"
    with tarfile.open(tmp_path / "hostile.tar", "w") as file:
        for name, kind in (
            ("../../escape.tokens", tarfile.SYMTYPE),
            ("/etc/x.pyd", tarfile.LNKTYPE),
            ("d", tarfile.CHRTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            file.addfile(member)
    hostile = (tmp_path / "hostile.tar").read_bytes()
    data = tar.read_bytes()
    tar.write_bytes(hostile[:2048] + data[2048:])
    before = sorted(p.name for p in tmp_path.rglob("*"))
    _, skipped = batches(folder, on_damage="skip")
    assert len(skipped) <= 4  # only the documents that were overwritten
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
