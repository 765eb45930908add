"""Which documents a run was trained on, worked out again from its ledger."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from megatrain.base.errors import DataError, nearest
from megatrain.config.build import build
from megatrain.config.source import from_plain
from megatrain.data.config import Data
from megatrain.data.corpus import Corpus
from megatrain.data.ledger import FILE, Ledger, Trained, digest
from megatrain.data.manifest import HELD_OUT, TOKENIZER, TRAIN
from megatrain.data.rows import empty, pieces
from megatrain.data.store import redacted
from megatrain.data.stream import Order, Stream
from megatrain.data.text import TextReader
from megatrain.data.tokenizer import Tokenizer

Key = tuple[str, str]
"""A document of a run: the address of its data set, and its id there."""


@dataclass(frozen=True)
class Sighting:
    """A document and the steps whose batches held tokens of it."""

    source: str
    document: str
    split: str
    steps: tuple[int, ...]
    """Empty if it was not trained on (yet)."""


def seen(
    run: Path, document: str | None = None, contains: str | None = None, access: Data | None = None
) -> list[Sighting]:
    """The documents called `document`, or with `contains` in their text, and when the run in folder `run` met them.

    Args:
        access: the `data` part of the run file, for what a ledger does not keep: addresses in full where they hold
            secrets, the cache, and the word that commands may be run.

    Raises:
        DataError: the run has no ledger, a data set is not the one it was trained on, or no document fits.
    """
    ledger = _open(run)
    corpora = _corpora(ledger, access)
    found = _called(corpora, document) if document is not None else _containing(corpora, contains or "", run)
    places = list(dict.fromkeys(((corpus.name, id), split) for split, corpus, id in found))
    if not places:
        raise DataError(_none(corpora, document, contains))
    steps: dict[Key, list[int]] = {key: [] for key, split in places if split == TRAIN}
    if steps:
        for step, keys in documents_by_step(ledger, access):
            for key in keys & steps.keys():
                steps[key].append(step)
    return [Sighting(*key, split, tuple(steps[key]) if split == TRAIN else ()) for key, split in places]


def documents_by_step(ledger: Ledger, access: Data | None = None) -> Iterator[tuple[int, set[Key]]]:
    """Each step that changed the weights, and the documents that its batch held tokens of.

    Raises:
        DataError: the order that the ledger describes leads elsewhere today, since a data set has changed.
    """
    stream: Stream | None = None
    order: dict[str, Any] | None = None
    for trained in ledger.history():
        if stream is None or order is not trained.order or stream.slots.batches > trained.first_batch:
            order, stream = trained.order, _stream(trained.order, access)
        while stream.slots.batches < trained.first_batch:
            stream.skip()
        yield from _steps(stream, trained)


def _steps(stream: Stream, trained: Trained) -> Iterator[tuple[int, set[Key]]]:
    sources = {shard.name: corpus.name for corpus in stream.corpora for shard in corpus.shards}
    for step in range(trained.after + 1, trained.upto + 1):
        _, rows = stream.fill(empty(*stream.shape))  # a curriculum changes the shape
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


def _data(order: dict[str, Any], access: Data | None) -> Data:
    """The `data` part of a run file that an `order` line describes."""
    data, _ = build(Data, from_plain({**order["data"], "workers": 0}, "the ledger"))
    if access is None:
        return data
    full = {redacted(source.path): source.path for source in access.sources}
    sources = tuple(replace(source, path=full.get(source.path, source.path)) for source in data.sources)
    return replace(data, sources=sources, cache=access.cache, allow_pipe=access.allow_pipe)


def _stream(order: dict[str, Any], access: Data | None) -> Stream:
    stream = Stream(Order(_data(order, access), order["seed"], order["global_batch"]), order["cursors"])
    changed = [c.name for c, known in zip(stream.corpora, order["sources"], strict=True) if c.fingerprint != known]
    if changed:
        raise DataError(
            f"the data set {', '.join(changed)} is not the one that the run was trained on: bring that one back"
        )
    return stream


def _corpora(ledger: Ledger, access: Data | None) -> list[tuple[str, Corpus]]:
    """Every split of every data set that the run has used, with the split's name."""
    found: dict[tuple[str, str], Corpus] = {}
    for order in (line for line in ledger.lines if line["kind"] == "order"):
        data = _data(order, access)
        for source in data.sources:
            train = Corpus(source.path, TRAIN, order["seed"], data.cache, data.allow_pipe)
            found[train.name, TRAIN] = train
            if HELD_OUT in train.manifest.splits and train.manifest.splits[HELD_OUT].size:
                found[train.name, HELD_OUT] = Corpus(source.path, HELD_OUT, order["seed"], data.cache, data.allow_pipe)
    return [(split, corpus) for (_, split), corpus in found.items()]


def _open(run: Path) -> Ledger:
    if not run.exists():
        raise DataError(f"{run} does not exist: give a run's folder (runs/NAME) or its run file")
    path = run / FILE
    if not path.exists():
        raise DataError(f"{run} has no {FILE}: give the folder of a run (runs/NAME) that has trained with a ledger")
    return Ledger(path)


Found = tuple[str, Corpus, str]
"""The name of a split, the split, and the id of a document in it."""


def _ids(corpora: list[tuple[str, Corpus]]) -> Iterator[str]:
    for _, corpus in corpora:
        for shard in corpus.shards:
            yield from map(shard.document_id, range(shard.entry.documents))


def _called(corpora: list[tuple[str, Corpus]], document: str) -> Iterator[Found]:
    """Looked for in the ids of whole shards at once: a millisecond for a hundred thousand documents."""
    for split, corpus in corpora:
        if any(shard.number_of(document) is not None for shard in corpus.shards):
            yield split, corpus, document


def _containing(corpora: list[tuple[str, Corpus]], text: str, run: Path) -> Iterator[Found]:
    """Every document is read: there is no index of what a text contains, and no cheap one would find any part of it."""
    for split, corpus in corpora:
        reader = TextReader.of(corpus, 1) if corpus.split.is_text else None
        tokenizer = _tokenizer(corpus, run) if reader is None else reader.tokenizer
        for shard in corpus.shards:
            for number in range(shard.entry.documents):
                shard.damaged(number)  # which brings a remote one here
                found = tokenizer.decode(shard.tokens(number)) if reader is None else reader.text(shard, number)
                if text in found:
                    yield split, corpus, shard.document_id(number)


def _tokenizer(corpus: Corpus, run: Path) -> Tokenizer:
    """The tokenizer of a data set: its own file, or the copy that a run keeps of one that is far away."""
    entry = corpus.manifest.tokenizer
    own = Path(corpus.name) / entry.file
    return Tokenizer.open(own if own.exists() else run / TOKENIZER, entry.end_of_document)


def _none(corpora: list[tuple[str, Corpus]], document: str | None, contains: str | None) -> str:
    where = f"in the run's data ({', '.join(dict.fromkeys(corpus.name for _, corpus in corpora))})"
    if document is None:
        return f"no document {where} contains {contains!r}: mind case and spaces, or look for a shorter text"
    guess = nearest(document, islice(_ids(corpora), 10_000))
    return f"no document {where} is called {document!r}: {f'did you mean {guess}?' if guess else 'inspect shows ids'}"
