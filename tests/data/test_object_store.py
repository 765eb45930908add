"""Data sets in an object store, against a real S3 server: faults change no batch, and secrets stay where they are."""

import itertools
import logging

import pytest
import torch

from megatrain.base.errors import ConfigError, DataError, RunError
from megatrain.data import store
from megatrain.data.cache import Cache
from megatrain.data.config import Data, WeightedSource
from megatrain.data.feed import Feed
from megatrain.data.store import ObjectStore, fetch, open_store, read_whole
from tests.data.corpora import documents, write

SECONDS = 0.3
"""What the client waits for one read where a server stalls for longer."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("objects") / "a", documents(90, seed=6), per_shard=30)


@pytest.fixture(scope="module")
def address(folder, _object_store):
    return _object_store.upload(folder, "corpus", "v1/a")


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(store, "FIRST_PAUSE", 0.005)
    original = ObjectStore.__init__
    monkeypatch.setattr(ObjectStore, "__init__", lambda self, address: original(self, address, read_timeout=SECONDS))


def tokens(path, tmp_path, workers=0, n=12):
    source, cache = WeightedSource(path=str(path)), Cache(dir=str(tmp_path / "cache"))
    data = Data(sources=(source,), seq_len=64, workers=workers, cache=cache)
    with Feed.open(data, seed=0, global_batch=4) as feed:
        return torch.stack([batch.tokens for batch in itertools.islice(feed, n)])


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_those_of_a_local_copy(folder, address, object_store, tmp_path, workers):
    assert torch.equal(tokens(address, tmp_path, workers), tokens(folder, tmp_path))


@pytest.mark.parametrize("fault", ["500", "short", "stall"])
def test_faults_of_the_store_change_no_batch(folder, address, object_store, impatient, tmp_path, fault):
    met = []

    def strikes(path, number):
        if path.endswith(".tar") and len(met) < 4 and number % 2:
            met.append(path)
            return fault
        return None

    object_store.fault = strikes
    assert torch.equal(tokens(address, tmp_path), tokens(folder, tmp_path))
    assert len(met) == 4


def test_a_read_goes_on_from_where_the_last_one_ended(folder, address, object_store, impatient, monkeypatch):
    monkeypatch.setattr(store, "CHUNK", 1000)
    name = "train/shard-000000.tar"
    object_store.fault = lambda path, number: "short" if number == 2 else None
    found = list(fetch(open_store(address), name, 500, 4500))
    assert b"".join(found) == (folder / name).read_bytes()[500:4500]
    assert [len(piece) for piece in found] == [1000] * 4  # what came before the fault was not asked for again
    assert len(object_store.gets) == 5


def test_a_store_that_stays_ill_is_given_up_with_a_sentence(address, object_store, impatient):
    object_store.fault = lambda path, number: "500"
    with pytest.raises(RunError, match=r"s3://corpus/v1/a/manifest.json could not be read"):
        read_whole(open_store(address), "manifest.json", patience=0.1)


def test_what_is_not_there_or_not_allowed_is_refused_at_once(address, object_store, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"s3://corpus/v2/manifest.json: FileNotFoundError: check the address"):
        tokens("s3://corpus/v2", tmp_path)
    for name in object_store.credentials:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DataError, match="Unable to locate credentials: give them as the store's own tools take them"):
        ObjectStore(address, skip_instance_cache=True).read("manifest.json")


def test_secrets_are_in_no_log_and_in_no_error(address, object_store, impatient, tmp_path, caplog):
    object_store.fault = lambda path, number: "500"
    with caplog.at_level(logging.DEBUG, "megatrain"), pytest.raises(RunError) as failure:
        list(fetch(open_store(address), "manifest.json", 0, 10, patience=0.1))
    with pytest.raises(ConfigError, match="which object stores do not take in an address") as refusal:
        open_store("s3://somebody:hunter2@corpus/v1/a")
    said = caplog.text + str(failure.value) + str(refusal.value)
    assert "corpus" in said
    for secret in ("hunter2", *object_store.credentials.values()):
        assert secret == "us-east-1" or secret not in said
