"""Raw text, made tokens as it is read: the same order laws as token shards, wherever a run was stopped."""

import hashlib
import io
import itertools
import json
import random
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatrain.base.errors import ConfigError, DataError
from megatrain.data.config import Data, WeightedSource
from megatrain.data.feed import Feed, held_out
from megatrain.data.manifest import HELD_OUT, TRAIN, Manifest
from megatrain.data.order import permutation
from megatrain.data.packing.best_fit import BestFit
from megatrain.data.rows import empty, pieces
from megatrain.data.shards import Shard
from megatrain.data.slots import merged
from megatrain.data.stream import Order, Stream
from megatrain.data.summary import drawn, summarize
from megatrain.data.text_index import IndexOptions, index
from megatrain.data.tokenizer import Tokenizer, train_tokenizer
from megatrain.data.verification import verify
from tests.data.corpora import documents, write
from tests.servers import Server

N_SLOTS, SEQ_LEN = 12, 32


WORDS = ["eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn", "elf", "zwölf"]


def texts(n, seed):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=1 + int(rng.expovariate(1 / 30)))) + f" ({seed}.{i})" for i in range(n)]


def tar_of(path, samples):
    with tarfile.open(path, "w") as tar:
        for name, content in samples:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


def corpus(folder: Path) -> Path:
    """A folder as people have them: webdataset tars of .txt and of .json beside other members, and JSON lines."""
    folder.mkdir()
    plain, objects, lines = texts(60, 1), texts(40, 2), texts(50, 3)
    tar_of(folder / "a.tar", [(f"{i:04d}.txt", text.encode()) for i, text in enumerate(plain)])
    members = [(f"{i}.{kind}", value) for i, text in enumerate(objects) for kind, value in (
        ("cls", b"7"), ("json", json.dumps({"text": text, "url": "u"}).encode())
    )]  # fmt: skip
    tar_of(folder / "b.tar", [*members, ("empty.txt", b" "), ("evil.pkl", b"cos\nsystem\n(S'false'\ntR.")])
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n\n" for t in lines))
    (folder.parent / "tokenizer.json").write_bytes(train_tokenizer(plain, 290))
    index(IndexOptions(folder, folder.parent / "tokenizer.json", held_out=0.1))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("text") / "corpus")


@pytest.fixture(scope="module")
def shards(tmp_path_factory, folder):
    """Token shards of the same tokenizer, to mix with."""
    fingerprint = Manifest.read(folder).tokenizer.fingerprint
    found = {i: np.minimum(tokens, 256) for i, tokens in documents(80, seed=4).items()}
    return write(tmp_path_factory.mktemp("tokens") / "t", found, fingerprint=fingerprint, vocab_size=290)


def config(*paths, **options):
    sources = tuple(WeightedSource(path=str(path)) for path in paths)
    return Data(**({"sources": sources, "seq_len": SEQ_LEN, "slots": N_SLOTS, "workers": 0} | options))


def global_batches(data, n, *, dp=1, cursors=None, batch=N_SLOTS):
    """Digest of each batch's tokens over all ranks, and the cursors after the last."""
    feeds = [
        Feed.open(data, seed=5, global_batch=batch, dp_rank=rank, dp_size=dp, cursors=cursors) for rank in range(dp)
    ]
    try:
        digests = []
        for _ in range(n):
            parts = [next(feed) for feed in feeds]
            digest = hashlib.sha256()
            for name in ("tokens", "targets", "weights", "positions", "documents"):
                for part in parts:
                    digest.update(getattr(part, name).numpy().tobytes())
            digests.append(digest.hexdigest())
        found = [part.cursors for part in parts]
        return digests, merged(found) if "own" in found[0] else found[0]
    finally:
        for feed in feeds:
            feed.close()


def slow_twin(folder, seed, n_batches):
    """Targets [batch, slot, seq] written down plainly: documents where their first byte lies, encoded one by one."""
    manifest = Manifest.read(folder)
    tokenizer = Tokenizer.open(folder / "tokenizer.json")
    files = [Shard.of(folder, entry, "uint8") for entry in manifest.splits[TRAIN].shards]
    total = manifest.splits[TRAIN].text_bytes
    streams = [[] for _ in range(N_SLOTS)]
    for epoch in range(12):
        at, print_ = 0, manifest.fingerprint
        for shard in permutation(len(files), seed, "shards", print_, epoch).tolist():
            for number in permutation(len(files[shard].length), seed, "documents", print_, epoch, shard).tolist():
                raw = files[shard].tokens(number).tobytes()
                text = json.loads(raw)["text"] if raw.startswith(b"{") else raw.decode()
                slot = next(s for s in range(N_SLOTS) if at < (s + 1) * total // N_SLOTS)
                streams[slot] += [*tokenizer.encode(text), tokenizer.end_of_document]
                at += len(raw)
    rows = [np.array(stream[: n_batches * SEQ_LEN]).reshape(n_batches, SEQ_LEN) for stream in streams]
    return np.stack(rows, axis=1)


def test_the_rows_are_those_of_the_slow_twin(folder):
    expected = slow_twin(folder, 5, 40)
    with Feed.open(config(folder), seed=5, global_batch=N_SLOTS) as feed:
        for batch, targets in zip(itertools.islice(feed, 40), expected, strict=True):
            assert (batch.targets.numpy() == targets).all()


def test_ranks_workers_and_kills_change_no_batch(folder, shards):
    data = config(folder, shards)
    expected, last = global_batches(data, 60)
    assert len(set(expected)) == 60
    rng = random.Random(3)
    found, cursors = [], None
    while len(found) < 60:
        n = min(rng.randint(1, 25), 60 - len(found))
        workers = rng.choice([0, 0, 1, 2]) if len(found) < 45 else 0
        part, cursors = global_batches(
            config(folder, shards, workers=workers),
            n,
            dp=rng.choice([1, 2, 3, 4]),
            cursors=json.loads(json.dumps(cursors)),
        )
        found += part
    assert found == expected
    assert cursors == last


@pytest.mark.parametrize("dp", [2, 6, 12])
def test_every_division_of_ranks_gives_the_same_batches(folder, dp):
    assert global_batches(config(folder), 20, dp=dp) == global_batches(config(folder), 20)


def test_several_rows_a_slot_are_one_stream(folder):
    with Feed.open(config(folder), seed=5, global_batch=2 * N_SLOTS) as feed:
        found = [next(feed).targets.numpy().reshape(N_SLOTS, 2, SEQ_LEN) for _ in range(10)]
    expected = slow_twin(folder, 5, 20).reshape(10, 2, N_SLOTS, SEQ_LEN).transpose(0, 2, 1, 3)
    assert (np.stack(found) == expected).all()


def test_each_document_begins_once_in_every_epoch(folder):
    stream = Stream(Order(config(folder), 5, N_SLOTS))
    split = Manifest.read(folder).splits[TRAIN]
    begun = Counter()
    while (stream.slots.tokens // -(-split.text_bytes // N_SLOTS)).min() < 2:
        _, rows = stream.fill(empty(*stream.shape))
        begun.update(piece.document for piece in pieces(rows) if piece.begins)
    assert len(begun) == split.documents
    assert min(begun.values()) >= 2
    assert max(begun.values()) <= 4  # slots go round at their own pace, so that some are an epoch ahead


def test_documents_are_masked_and_entered_in_the_middle_like_those_of_token_shards(folder):
    end = Manifest.read(folder).tokenizer.end_of_document
    with Feed.open(config(folder), seed=5, global_batch=N_SLOTS) as feed:
        first, second = next(feed), next(feed)
    for batch in (first, second):
        begins = (batch.positions == 0).numpy()
        inside = batch.tokens.numpy()[:, 1:][~begins[:, 1:]]
        assert (inside == batch.targets.numpy()[:, :-1][~begins[:, 1:]]).all()
        assert (batch.tokens.numpy()[:, 1:][begins[:, 1:]] == end).all()
    goes_on = first.targets[:, -1] != end
    assert goes_on.any()
    assert (second.tokens[:, 0][goes_on] == first.targets[:, -1][goes_on]).all()


def test_held_out_documents_are_token_shards_and_never_trained_on(folder):
    manifest = Manifest.read(folder)
    assert not manifest.splits[HELD_OUT].is_text
    kept = {
        Shard.of(folder, e, manifest.dtype).document_id(n)
        for e in manifest.splits[HELD_OUT].shards
        for n in range(e.documents)
    }
    trained = {
        Shard.of(folder, e, "uint8").document_id(n) for e in manifest.splits[TRAIN].shards for n in range(e.documents)
    }
    assert not kept & trained
    assert len(kept) > 5
    assert len(kept) + len(trained) == 150
    counted = sum(batch.weights.sum() for batch in held_out(config(folder), global_batch=4))
    assert counted == manifest.splits[HELD_OUT].tokens
    assert manifest.provenance["refused"] == {
        "empty": {"documents": 1, "first": ["b.tar/empty"]},
        "no .txt and no .json in its sample": {"documents": 1, "first": ["b.tar/evil"]},
    }


def test_best_fit_is_refused_with_the_reason(folder):
    with pytest.raises(ConfigError, match=r"best_fit needs the lengths of documents in tokens, and .* is raw text"):
        Stream(Order(config(folder, packing=BestFit()), 0, N_SLOTS))


def test_more_slots_than_documents_are_refused(folder):
    with pytest.raises(DataError, match=r"has \d+ documents in its train split, fewer than the 240 slots"):
        Stream(Order(config(folder, slots=240, seq_len=8), 0, 240))


def test_cursors_of_some_slots_are_never_taken_for_those_of_all(folder):
    with Feed.open(config(folder), seed=5, global_batch=N_SLOTS, dp_rank=1, dp_size=3) as feed:
        part = next(feed).cursors
    assert part["own"] == [4, 8]
    with pytest.raises(ValueError, match="put them together"):
        Feed.open(config(folder), seed=5, global_batch=N_SLOTS, cursors=part)
    with pytest.raises(ValueError, match="do not go together"):
        merged([part, part | {"own": [9, 12]}])


def test_a_changed_byte_is_found_or_left_out_and_a_resume_leaves_out_the_same(tmp_path):
    folder = corpus(tmp_path / "corpus")
    with open(folder / "a.tar", "r+b") as file:
        file.seek(512 + 3)
        file.write(b"#")
    with pytest.raises(DataError, match=r"document 'a.tar/0000' of .*a.tar is damaged \(its bytes do not have"):
        global_batches(config(folder), 60)
    data = config(folder, on_damage="skip")
    expected, _ = global_batches(data, 60)
    first, cursors = global_batches(data, 17, dp=3)
    rest, _ = global_batches(data, 43, dp=2, cursors=cursors)
    assert first + rest == expected
    with Feed.open(data, seed=5, global_batch=N_SLOTS) as feed:
        for _ in range(60):
            next(feed)
        assert list(feed.skipped) == [(str(folder / "a.tar"), "a.tar/0000")]


def test_a_text_file_that_was_cut_or_exchanged_is_refused(tmp_path):
    folder = corpus(tmp_path / "corpus")
    _, cursors = global_batches(config(folder), 3)
    content = (folder / "c.jsonl").read_bytes()
    (folder / "c.jsonl").write_bytes(content[:-10])
    with pytest.raises(DataError, match=r"c.jsonl has \d+ bytes and the manifest says \d+"):
        global_batches(config(folder), 60)
    (folder / "c.jsonl").write_bytes(content + content)
    index(IndexOptions(folder, tmp_path / "tokenizer.json", held_out=0.1))
    with pytest.raises(DataError, match="has changed"):
        global_batches(config(folder), 1, cursors=cursors)


def test_another_tokenizer_in_its_place_is_refused(tmp_path):
    folder = corpus(tmp_path / "corpus")
    (folder / "tokenizer.json").write_bytes(train_tokenizer(texts(9, 9), 270))
    with pytest.raises(DataError, match="is not the tokenizer that the manifest names"):
        global_batches(config(folder), 1)


def test_indexing_again_gives_the_same_bytes_and_token_shards_are_not_indexed(folder, shards, tmp_path):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    index(IndexOptions(folder, folder.parent / "tokenizer.json", held_out=0.1))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    with pytest.raises(DataError, match="is a data set of token shards already"):
        index(IndexOptions(shards, folder.parent / "tokenizer.json"))


def faults(address):
    return [fault for _, found in verify(str(address)) for fault in found]


def test_verify_names_the_text_that_changed_since_it_was_indexed(tmp_path):
    folder = corpus(tmp_path / "corpus")
    assert faults(folder) == []
    with open(folder / "c.jsonl", "r+b") as file:
        file.seek(12)
        file.write(b"#")
    (what, documents) = [fault.what for fault in faults(folder)]
    assert "sha256 is" in what
    assert documents == "1 documents do not have the bytes that were indexed: 'c.jsonl:1'"
    (folder / "a.tar").unlink()
    assert ("a.tar", "is missing") in [(fault.path, fault.what) for fault in faults(folder)]


def test_inspect_shows_text_by_its_bytes(folder):
    facts = summarize(str(folder))
    train = facts["splits"][TRAIN]
    split = Manifest.read(folder).splits[TRAIN]
    assert train["form"] == "text"
    assert train["length"]["mean"] * split.documents == pytest.approx(split.text_bytes)
    assert {example["begins"].split(" ")[0] for example in train["examples"]} <= set(WORDS)
    assert "bytes of a document" in "\n".join(drawn(facts))


def test_text_on_a_server_gives_the_same_batches_and_can_be_inspected_and_verified(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # where the cache is
    with Server(folder) as server:
        assert global_batches(config(server.address), 20)[0] == global_batches(config(folder), 20)[0]
        here, there = (summarize(str(address)) for address in (folder, server.address))
        assert there["splits"] == here["splits"]
        assert faults(server.address) == []
        (tmp_path / ".cache/megatrain/files").rename(tmp_path / "gone")
        server.fault = lambda handler, body, number: handler.path.endswith("b.tar") and _answers(handler, body[::-1])
        assert [fault.path for fault in faults(server.address)] == ["b.tar"]


def _answers(handler, body):
    handler.answer(206, body)
    return True


def test_a_document_is_found_by_its_id_alone(folder):
    for entry in Manifest.read(folder).splits[TRAIN].shards:
        shard = Shard.of(folder, entry, "uint8")
        ids = [shard.document_id(number) for number in range(entry.documents)]
        assert [shard.number_of(document) for document in ids] == list(range(entry.documents))
        assert [shard.number_of(name) for name in ("", "a", ids[0][1:], ids[0] + ids[1], "nobody")] == [None] * 5
