"""Which documents a run was trained on, worked out again from its ledger."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatrain.base.errors import DataError, nearest
from megatrain.config.build import build
from megatrain.config.source import from_plain
from megatrain.data.config import Data
from megatrain.data.ledger import FILE, Ledger, Trained, digest
from megatrain.data.rows import empty, pieces
from megatrain.data.shards import TRAIN, Manifest, Shard
from megatrain.data.stream import Order, Stream
from megatrain.data.tokenizer import Tokenizer

Key = tuple[str, str]
"""A document of a run: the path of its data set, and its id there."""


@dataclass(frozen=True)
class Sighting:
    """A document and the steps whose batches held tokens of it."""

    source: str
    document: str
    split: str
    steps: tuple[int, ...]
    """Empty if it was not trained on (yet)."""


def seen(run: Path, document: str | None = None, contains: str | None = None) -> list[Sighting]:
    """The documents called `document`, or with `contains` in their text, and when the run in folder `run` met them.

    Raises:
        DataError: the run has no ledger, a data set is not the one it was trained on, or no document fits.
    """
    ledger = _open(run)
    folders = list(dict.fromkeys(s["path"] for t in ledger.lines if t["kind"] == "order" for s in t["data"]["sources"]))
    wanted = {
        (folder, id): split
        for folder in folders
        for split, id in (_called(folder, document) if document is not None else _containing(folder, contains or ""))
    }
    if not wanted:
        raise DataError(_none(folders, document, contains))
    steps: dict[Key, list[int]] = {key: [] for key in wanted}
    if TRAIN in wanted.values():
        for step, keys in documents_by_step(ledger):
            for key in keys & wanted.keys():
                steps[key].append(step)
    return [Sighting(*key, split, tuple(steps[key])) for key, split in wanted.items()]


def documents_by_step(ledger: Ledger) -> Iterator[tuple[int, set[Key]]]:
    """Each step that changed the weights, and the documents that its batch held tokens of.

    Raises:
        DataError: the order that the ledger describes leads elsewhere today, since a data set has changed.
    """
    stream: Stream | None = None
    order: dict[str, Any] | None = None
    for trained in ledger.history():
        if stream is None or order is not trained.order or stream.slots.batches > trained.first_batch:
            order, stream = trained.order, _stream(trained.order)
        while stream.slots.batches < trained.first_batch:
            stream.skip()
        yield from _steps(stream, trained)


def _steps(stream: Stream, trained: Trained) -> Iterator[tuple[int, set[Key]]]:
    arrays = empty(stream.order.global_batch, stream.order.data.seq_len)
    sources = {
        str(shard.tar): s.path
        for s, c in zip(stream.order.data.sources, stream.corpora, strict=True)
        for shard in c.shards
    }
    for step in range(trained.after + 1, trained.upto + 1):
        _, rows = stream.fill(arrays)
        if step in trained.skipped:
            continue
        left_out = {(piece.tar, piece.document) for piece in rows.skipped}
        met = {(piece.tar, piece.document) for piece in pieces(rows)} - left_out
        yield step, {(sources[tar], document) for tar, document in met}
    if trained.digest and digest(stream.cursors()) != trained.digest:
        raise DataError(
            f"steps {trained.after + 1} to {trained.upto} were trained on another order than the ledger's values give "
            "now: use the data sets and the program that the run was made with"
        )


def _stream(order: dict[str, Any]) -> Stream:
    data, _ = build(Data, from_plain({**order["data"], "workers": 0}, "the ledger"))
    stream = Stream(Order(data, order["seed"], order["global_batch"]), order["cursors"])
    found = [corpus.fingerprint for corpus in stream.corpora]
    if found != order["sources"]:
        changed = [s.path for s, a, b in zip(data.sources, found, order["sources"], strict=True) if a != b]
        raise DataError(
            f"the data set {', '.join(changed)} is not the one that the run was trained on: bring that one back"
        )
    return stream


def _open(run: Path) -> Ledger:
    path = run / FILE
    if not path.exists():
        raise DataError(f"{run} has no {FILE}: give the folder of a run (runs/NAME) that has trained with a ledger")
    return Ledger(path)


def _called(folder: str, document: str) -> Iterator[tuple[str, str]]:
    for split, shard in _shards(folder):
        for number in range(shard.entry.documents):
            if shard.document_id(number) == document:
                yield split, document


def _containing(folder: str, text: str) -> Iterator[tuple[str, str]]:
    manifest = Manifest.read(Path(folder))
    tokenizer = Tokenizer.open(Path(folder) / manifest.tokenizer.file, manifest.tokenizer.end_of_document)
    for split, shard in _shards(folder):
        for number in range(shard.entry.documents):
            if text in tokenizer.decode(shard.tokens(number)):
                yield split, shard.document_id(number)


def _shards(folder: str) -> Iterator[tuple[str, Shard]]:
    manifest = Manifest.read(Path(folder))
    for split, found in manifest.splits.items():
        for entry in found.shards:
            yield split, Shard.of(Path(folder), entry, manifest.dtype)


def _none(folders: Iterable[str], document: str | None, contains: str | None) -> str:
    where = f"in the run's data ({', '.join(folders)})"
    if document is None:
        return f"no document {where} contains {contains!r}: mind case and spaces, or look for a shorter text"
    shards = [shard for folder in folders for _, shard in _shards(folder)]
    guess = nearest(
        document, (shard.document_id(n) for shard in shards for n in range(min(1000, shard.entry.documents)))
    )
    return f"no document {where} is called {document!r}: {f'did you mean {guess}?' if guess else 'inspect shows ids'}"
