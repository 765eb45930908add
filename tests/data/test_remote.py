"""Data sets on servers: the same batches as from a local copy, whatever the network does."""

import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch

from megatrain.base.errors import ConfigError, DataError, RunError
from megatrain.base.files import sha256_of
from megatrain.data import store
from megatrain.data.cache import Cache
from megatrain.data.config import Data, WeightedSource
from megatrain.data.feed import Feed
from megatrain.data.manifest import Manifest
from megatrain.data.store import ObjectStore, PipeStore, WebStore, append, fetch, open_store, redacted
from tests.data.corpora import documents, write
from tests.servers import FAULTS, Server, answers_503


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("served") / "a", documents(150, seed=6), per_shard=50)


@pytest.fixture(scope="module")
def expected(folder):
    data = Data(sources=(WeightedSource(path=str(folder)),), seq_len=64, workers=0)
    return [batch.tokens for batch in itertools.islice(Feed.open(data, seed=0, global_batch=4), 60)]


@pytest.fixture
def impatient(monkeypatch):
    """A client that waits for a stalled read for a fraction of a second."""
    monkeypatch.setattr(store, "FIRST_PAUSE", 0.005)
    original = WebStore.__init__
    monkeypatch.setattr(WebStore, "__init__", lambda self, address: original(self, address, read_timeout=0.2))


def config(address, tmp_path, **options):
    sources = (WeightedSource(path=address),)
    return Data(
        **({"sources": sources, "seq_len": 64, "workers": 0, "cache": Cache(dir=str(tmp_path / "cache"))} | options)
    )


def tokens(data, n=60):
    with Feed.open(data, seed=0, global_batch=4) as feed:
        return [batch.tokens for batch in itertools.islice(feed, n)]


def assert_same(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_a_local_copy(folder, expected, tmp_path, workers):
    with Server(folder) as server:
        assert_same(tokens(config(server.address, tmp_path, workers=workers)), expected)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_network_change_no_batch(folder, expected, tmp_path, impatient, fault):
    with Server(folder, fault) as server:
        assert_same(tokens(config(server.address, tmp_path)), expected)


def test_a_server_without_ranges_will_do(folder, expected, tmp_path):
    with Server(folder, ranges=False) as server:
        assert_same(tokens(config(server.address, tmp_path)), expected)


def test_what_was_copied_is_whole_and_the_next_run_asks_for_the_manifest_only(folder, expected, tmp_path):
    data = None
    with Server(folder) as server:
        data = config(server.address, tmp_path)
        assert_same(tokens(data), expected)
        for entry in Manifest.read(folder).splits["train"].shards:
            copy = partial(append, WebStore(server.address), entry.path, entry.bytes)
            data.cache.get(entry.sha256, entry.bytes, "", copy)  # waits for the copy behind
            assert sha256_of(data.cache.path(entry.sha256)) == entry.sha256
        server.requests.clear()
        assert_same(tokens(data), expected)
        assert set(server.requests) == {"/manifest.json"}


def test_the_first_batch_asks_for_its_own_documents(tmp_path):
    served = write(tmp_path / "big", documents(400, mean=3000), per_shard=400)
    with Server(served, lambda handler, body, number: len(body) > 50_000 and _hold(handler)) as server:
        assert len(tokens(config(server.address, tmp_path), 1)) == 1


def _hold(handler):
    """Never answer who wants much: the copy behind."""
    handler.server.held = threading.Event()
    handler.server.held.wait(1.0)
    handler.close_connection = True
    return True


def test_a_shard_that_was_damaged_at_its_source_is_found_at_its_document(folder, tmp_path):
    entry = Manifest.read(folder).splits["train"].shards[1]

    def flip(handler, body, number):
        if not handler.path.endswith("shard-000001.tar"):
            return False
        handler.answer(206, bytes(b ^ 1 for b in body))
        return True

    with (
        Server(folder, flip) as server,
        pytest.raises(DataError, match=r"document 'd6/\d+' of http://127.0.0.1:\d+/train/shard-000001.tar is damaged"),
    ):
        tokens(config(server.address, tmp_path))
    assert not config("x", tmp_path).cache.path(entry.sha256).exists()


def test_a_page_in_place_of_a_shard_is_never_taken_for_it(folder, tmp_path):
    def page(handler, body, number):
        if not handler.path.endswith(".tar"):
            return False
        handler.answer(200, b"<html>please log in</html>")
        return True

    with Server(folder, page) as server:
        patient = WebStore(server.address)
        with pytest.raises(RunError, match="could not be read"):
            list(fetch(patient, "train/shard-000000.tar", 0, 10_000, patience=0.3))


def test_a_source_that_is_gone_is_waited_for_and_then_given_up(folder):
    with Server(folder, lambda handler, body, number: number < 4 and answers_503(handler, body, 0)) as server:
        found = b"".join(fetch(WebStore(server.address), "manifest.json", 0, 50))
    assert found == (folder / "manifest.json").read_bytes()[:50]
    with pytest.raises(RunError, match=r"could not be read for \d+ seconds .* look after the server"):
        list(fetch(WebStore(server.address), "manifest.json", 0, 50, patience=0.2))


def test_a_missing_file_is_refused_at_once(folder, tmp_path):
    with Server(folder) as server, pytest.raises(DataError, match=r"/x/manifest.json: the server answered 404"):
        tokens(config(server.address + "/x", tmp_path))


# ------------------------------------------------------------------------------------------------ secrets and hostility


def test_secrets_reach_the_server_and_nothing_else(folder, tmp_path, caplog):
    with Server(folder) as server, caplog.at_level(logging.DEBUG):
        address = server.address.replace("//", "//user:hunter2@") + "?token=s3cret"
        data = config(address, tmp_path)
        with Feed.open(data, seed=0, global_batch=4) as feed:
            cursors = json.dumps(next(feed).cursors)
        with pytest.raises(DataError) as refused:
            open_store(address + "&x=1").read("absent")
    said = cursors + caplog.text + str(refused.value) + " ".join(str(p) for p in tmp_path.rglob("*"))
    assert "hunter2" not in said
    assert "s3cret" not in said
    path, headers = server.seen[0]
    assert path.endswith("?token=s3cret")
    assert headers["Authorization"] == "Basic dXNlcjpodW50ZXIy"


@pytest.mark.parametrize("to", ["http://169.254.169.254/latest", "file:///etc/passwd", "http://localhost:1/x"])
def test_redirects_into_the_machine_or_its_network_are_not_followed(folder, to):
    def redirect(handler, body, number):
        handler.answer(302, b"", Location=to)
        return True

    with Server(folder, redirect) as server, pytest.raises(DataError, match=r"is not (followed|allowed)"):
        WebStore(server.address).read("manifest.json")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("pipe:touch /tmp/canary {}", "would run a command: set data.allow_pipe"),
        ("file:///etc", "scheme file: allowed are http, https, s3, gs"),
        ("ftp://me:pw@host/x", "ftp://host/x has scheme ftp"),
    ],
)
def test_other_schemes_are_refused(address, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        Feed.open(config(address, tmp_path), seed=0, global_batch=4)


def test_a_command_is_run_where_it_is_allowed_and_without_a_shell(folder, expected, tmp_path):
    data = config(f"pipe:cat {folder}/{{}}", tmp_path, allow_pipe=True)
    assert_same(tokens(data), expected)
    canary = tmp_path / "canary"
    assert PipeStore(f"echo {{}} ; touch {canary}").read("x") == f"x ; touch {canary}\n".encode()
    assert not canary.exists()
    with pytest.raises(ConfigError, match=r"has no \{\}"):
        PipeStore("cat file")


def test_object_stores_are_read_through_fsspec(folder, monkeypatch):
    """fsspec's store in memory stands for the others; their packages need not be here."""
    import fsspec

    files = fsspec.filesystem("memory")
    files.pipe_file("/bucket/manifest.json", b"0123456789")
    monkeypatch.setitem(store.OBJECT_STORES, "memory", "fsspec")
    found = open_store("memory://bucket")
    assert found.read("manifest.json", 2, 5) == b"234"
    assert found.read("manifest.json") == b"0123456789"
    with pytest.raises(DataError, match="memory://bucket/absent: FileNotFoundError"):
        found.read("absent")
    monkeypatch.setitem(store.OBJECT_STORES, "memory", "no_such_package")
    with pytest.raises(DataError, match="needs no_such_package"):
        ObjectStore("memory://bucket")


def test_what_people_see_of_an_address_holds_no_secret():
    assert redacted("https://a:b@h:1/p?q=1#f") == "https://h:1/p"
    assert redacted("/plain/path") == "/plain/path"
    assert redacted("pipe:ssh -i key host") == "pipe:..."


# ------------------------------------------------------------------------------------------------ the cache


def put(cache, content, fetches=None):
    def write(file):
        if fetches is not None:
            fetches.append(1)
        file.write(content[file.tell() :])

    return cache.get(hashlib.sha256(content).hexdigest(), len(content), "x", write)


def test_the_cache_forgets_what_was_not_used_for_the_longest_time(tmp_path):
    cache = Cache(dir=str(tmp_path), limit=2500)
    paths = [put(cache, bytes([i]) * 1000) for i in range(2)]
    for i, path in enumerate(paths):
        os.utime(path, (i, i))
    assert cache.find(paths[0].name)  # used now
    put(cache, b"x" * 1000)
    assert paths[0].exists()
    assert not paths[1].exists()


def test_a_fetch_that_was_killed_goes_on_where_it_was(tmp_path):
    cache = Cache(dir=str(tmp_path))
    content = b"abc" * 1000
    fetched = []

    def killed(file):
        file.write(content[:1234])
        raise KeyboardInterrupt

    digest = hashlib.sha256(content).hexdigest()
    with pytest.raises(KeyboardInterrupt):
        cache.get(digest, len(content), "x", killed)
    assert cache.find(digest) is None

    def rest(file):
        fetched.append(file.tell())
        file.write(content[file.tell() :])

    assert cache.get(digest, len(content), "x", rest).read_bytes() == content
    assert fetched == [1234]


def _builder(folder, counts):
    put(Cache(dir=folder), b"shared" * 1000, _Counting(counts))


class _Counting(list):
    def __init__(self, path):
        self.path = path

    def append(self, _):
        with open(self.path, "a") as file:
            file.write("1")


def test_many_processes_fetch_a_file_once(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_builder, args=(str(tmp_path), tmp_path / "counts")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert (tmp_path / "counts").read_text() == "1"


def test_append_writes_what_is_missing(folder, tmp_path):
    with Server(folder) as server, open(tmp_path / "copy", "ab") as file:
        whole = (folder / "train/shard-000000.tar").read_bytes()
        file.write(whole[:100])
        append(WebStore(server.address), "train/shard-000000.tar", len(whole), file)
    assert (tmp_path / "copy").read_bytes() == whole


def test_two_data_sets_of_the_same_names_do_not_mix_in_the_cache(folder, expected, tmp_path):
    other = write(tmp_path / "other", documents(150, seed=8), per_shard=50)
    with Server(folder) as one, Server(other) as two:
        data = config(one.address, tmp_path)
        tokens(replace(data, sources=(WeightedSource(path=two.address),)), 10)
        assert_same(tokens(data), expected)
