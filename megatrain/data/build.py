"""Build a data set: files to a tokenizer, token shards and a manifest.

All is written into a folder beside the one asked for, which gets its name when it is whole. A build that was killed
goes on after its last whole shards and ends with the same bytes: chunks, their order and the place of every document
depend on the input and the options only, and workers hand back what they encoded in order.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatrain.base.errors import ConfigError, DataError
from megatrain.base.files import written_whole
from megatrain.data.documents import CHUNK_BYTES, Chunk, Document, Source
from megatrain.data.encoding import EncodedDocument, EncodeJob, encode, hash_fraction, ordered_map
from megatrain.data.journal import Done, Journal, Tally
from megatrain.data.manifest import HELD_OUT, MANIFEST, TOKENIZER, TRAIN, Manifest, Split, TokenizerEntry
from megatrain.data.manifest import token_dtype as narrowest_dtype
from megatrain.data.shards import ShardWriter
from megatrain.data.sources import chunks_of, find_sources, reading_problems
from megatrain.data.tokenizer import SMALLEST_VOCABULARY, Tokenizer, train_tokenizer

_SMALL_CORPUS = 2**25  # bytes: below this a hash may well hold out nothing, so the hashes are looked at first
_VERSION = 1  # of how input becomes shards: a build of another version does not go on from this one's
_VOCAB_SIZE = 32_768
_TOKENIZER_SAMPLE = 2**28  # bytes of text that a tokenizer is trained on; more changes hardly a merge


@dataclass(frozen=True)
class BuildOptions:
    """What to build from what. Equal options over equal files give equal data sets, byte for byte."""

    inputs: tuple[Path, ...]
    out: Path
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    tokenizer: Path | None = None
    """None trains one on the input."""
    end_of_document: str | None = None
    """Its end-of-document token; None looks for the usual names."""
    vocab_size: int | None = None
    """Of the tokenizer to train; None is 32,768."""
    held_out: float = 0.01
    """Share of the documents that is never trained on, chosen by a hash of their content."""
    shard_tokens: int = 2**26
    """A shard ends with the chunk of documents (a mebibyte of text; less where shards are small) that reaches this."""
    dtype: str = "auto"
    reading: dict[str, Any] = field(default_factory=dict)
    """Options of the readers: `text_field`, `id_field`, `separator`, `piece_bytes`."""
    workers: int = 1

    @property
    def trained_size(self) -> int:
        return _VOCAB_SIZE if self.vocab_size is None else self.vocab_size

    def problems(self) -> list[str]:
        found = []
        if not self.inputs:
            found.append("no input: give one or more files or folders of text")
        if self.tokenizer is not None and self.vocab_size is not None:
            found.append(f"vocab_size={self.vocab_size} is of a tokenizer to train, and one is given: leave one out")
        if self.trained_size < SMALLEST_VOCABULARY:
            found.append(f"vocab_size={self.vocab_size} has no room for all bytes: take {SMALLEST_VOCABULARY} or more")
        if not 0 <= self.held_out < 1:
            found.append(f"held_out={self.held_out} is not a share: take one in [0, 1), for example 0.01")
        if self.shard_tokens < 1:
            found.append(f"shard_tokens={self.shard_tokens} must be at least 1")
        if self.workers < 1:
            found.append(f"workers={self.workers} must be at least 1")
        found += reading_problems(self.reading)
        if self.dtype not in ("auto", "uint16", "uint32"):
            found.append(f"dtype={self.dtype!r} is not known: take auto, uint16 or uint32")
        return found


class Watcher(Protocol):
    """Is told how a build goes on."""

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` bytes of input begins."""
        ...

    def advance(self, bytes: int, tokens: int) -> None: ...


class Silent:
    def stage(self, name: str, total: int) -> None: ...
    def advance(self, bytes: int, tokens: int) -> None: ...


@dataclass(frozen=True)
class Built:
    manifest: Manifest
    existed: bool
    """The data set was there already, of the same input and options."""
    resumed_shards: int = 0
    """Shards that an earlier, killed build had finished."""


def build(options: BuildOptions, watcher: Watcher | None = None) -> Built:
    """Build the data set, or find that it is there.

    Raises:
        ConfigError: an option is not allowed.
        DataError: the input, the tokenizer or the output folder is not as it must be.
    """
    if problems := options.problems():
        raise ConfigError(problems)
    sources = find_sources(options.inputs, options.include, options.exclude)
    arguments = _fingerprint(options, sources)
    if (existing := _existing(options.out, arguments)) is not None:
        return Built(existing, existed=True)
    try:
        with Journal.open(options.out, f"{arguments} {_changes(sources)}") as journal:
            return _Build(options, sources, arguments, journal, watcher or Silent()).run()
    except OSError as error:
        raise DataError(
            f"{options.out} cannot be written ({error.strerror or error}): give an --out "
            "folder that this user may write and that has room; the same command then goes on where it stopped"
        ) from error


class _Build:
    """One build under way."""

    def __init__(
        self, options: BuildOptions, sources: list[Source], arguments: str, journal: Journal, watcher: Watcher
    ):
        self.options, self.sources, self.arguments = options, sources, arguments
        self.journal, self.watcher = journal, watcher
        self.folder = journal.folder
        self.total = sum(source.size for source in sources)

    def run(self) -> Built:
        limit = self._held_out_limit()
        tokenizer = self._tokenizer(limit)
        dtype = self._dtype(tokenizer)
        resumed = len(self.journal.done)
        tally = self._write_shards(tokenizer, limit, dtype)
        splits = {name: Split(self.journal.shards(name)) for name in (TRAIN, HELD_OUT)}
        if not splits[TRAIN].documents:
            raise DataError(f"nothing to train on in {len(self.sources)} files: {tally.said()}")
        entry = TokenizerEntry(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.end_of_document)
        manifest = Manifest(self.options.out.resolve().name, entry, dtype, splits, self._provenance(limit, tally))
        manifest.write(self.folder)
        self.journal.publish()
        return Built(manifest, existed=False, resumed_shards=resumed)

    def _chunks(self) -> Iterator[Chunk]:
        # A token stands for more than two bytes of text, so that a shard does not end far beyond its size.
        chunk_bytes = min(CHUNK_BYTES, 2 * self.options.shard_tokens)
        return chunks_of(self.sources, {**self.options.reading, "chunk_bytes": chunk_bytes})

    def _provenance(self, limit: float, tally: Tally) -> dict[str, Any]:
        options = self.options
        return {
            "inputs": [str(path) for path in options.inputs],
            "include": list(options.include),
            "exclude": list(options.exclude),
            "files": len(self.sources),
            "bytes": self.total,
            "held_out": options.held_out,
            "held_out_limit": limit,
            "refused": tally.as_json(),
            "tokenizer": "trained on the input" if options.tokenizer is None else str(options.tokenizer),
            "arguments": self.arguments,
            "made_with": {name: version(name) for name in ("megatrain", "tokenizers", "webdataset")},
        }

    # -------------------------------------------------------------------------------------------- before the shards

    def _held_out_limit(self) -> float:
        """Documents with a hash below this are held out: the share asked for, unless that leaves a split empty."""
        share = self.options.held_out
        if share == 0 or self.total > _SMALL_CORPUS:
            return share
        self.watcher.stage("reading", self.total)
        hashes: set[float] = set()
        for chunk in self._chunks():
            hashes.update(hash_fraction(found) for found in chunk.documents() if isinstance(found, Document))
            self.watcher.advance(chunk.size, 0)
        if len(hashes) < 2:
            return 0.0
        lowest, *_, highest = sorted(hashes)
        return min(max(share, float(np.nextafter(lowest, 1))), highest)

    def _tokenizer(self, limit: float) -> Tokenizer:
        """The tokenizer given, or one trained on the documents to train on. A copy of it belongs to the data set."""
        path = self.folder / TOKENIZER
        if self.options.tokenizer is not None:
            tokenizer = Tokenizer.open(self.options.tokenizer, self.options.end_of_document)
            _keep(path, self.options.tokenizer.read_bytes())
            return tokenizer
        if not path.exists():  # else a build that was killed had trained it
            self.watcher.stage("training the tokenizer", self.total)
            _keep(path, train_tokenizer(self._sample(limit), self.options.trained_size))
        return Tokenizer.open(path)

    def _sample(self, limit: float) -> Iterator[str]:
        """Text to train a tokenizer on: chunks from all over the input."""
        share = _TOKENIZER_SAMPLE / self.total
        left = 2 * _TOKENIZER_SAMPLE  # compressed input holds more text than its size says
        for number, chunk in enumerate(self._chunks()):
            self.watcher.advance(chunk.size, 0)
            draw = hashlib.blake2b(str(number).encode(), digest_size=8).digest()
            if left <= 0 or int.from_bytes(draw, "little") / 2**64 >= share:
                continue
            for found in chunk.documents():
                if isinstance(found, Document) and found.tokens is not None:
                    raise DataError(
                        f"{found.id} holds token ids, which no tokenizer can be trained on: give the --tokenizer that "
                        "made them"
                    )
                if isinstance(found, Document) and hash_fraction(found) >= limit:
                    left -= len(found.text)
                    yield found.text

    def _dtype(self, tokenizer: Tokenizer) -> str:
        narrowest = narrowest_dtype(tokenizer.vocab_size)
        if self.options.dtype == "auto":
            return narrowest
        if tokenizer.vocab_size > np.iinfo(self.options.dtype).max + 1:
            raise DataError(
                f"a vocabulary of {tokenizer.vocab_size} does not fit {self.options.dtype}, which has ids below "
                f"{np.iinfo(self.options.dtype).max + 1}: take --dtype {narrowest}, or a smaller vocabulary"
            )
        return self.options.dtype

    # -------------------------------------------------------------------------------------------- the shards

    def _write_shards(self, tokenizer: Tokenizer, limit: float, dtype: str) -> Tally:
        """Encode what is not on disk yet and write it. Returns what was refused."""
        starts = [self.journal.next_chunk(split) for split in (TRAIN, HELD_OUT)]
        start = min(starts)
        tally = self.journal.tally(start)
        self.watcher.stage("writing tokens", self.total)
        chunks = self._chunks()
        for chunk in islice(chunks, start):
            self.watcher.advance(chunk.size, 0)
        known = self.folder / TOKENIZER, tokenizer.fingerprint, tokenizer.end_of_document
        jobs = (
            EncodeJob(chunk, *known, limit, wants=(number >= starts[0], number >= starts[1]))
            for number, chunk in enumerate(chunks, start)
        )
        train, held_out = (_SplitWriter(self.journal, s, dtype, self.options.shard_tokens) for s in (TRAIN, HELD_OUT))
        number = start
        try:
            for number, encoded in enumerate(ordered_map(encode, jobs, self.options.workers), start + 1):
                for refused in encoded.refused:
                    tally.add(refused)
                for document in encoded.documents:
                    (held_out if document.held_out else train).write(document)
                for writer in (train, held_out):
                    writer.chunk_ends(number, tally)
                self.watcher.advance(encoded.size, sum(len(document.tokens) for document in encoded.documents))
            for writer in (train, held_out):
                writer.finish(number, tally)
        except BaseException:
            for writer in (train, held_out):
                writer.discard()
            raise
        return tally


class _SplitWriter:
    """Writes the documents of one split into one shard after the other."""

    def __init__(self, journal: Journal, split: str, dtype: str, shard_tokens: int):
        self.journal, self.split, self.dtype, self.shard_tokens = journal, split, dtype, shard_tokens
        self._shard: ShardWriter | None = None

    def write(self, document: EncodedDocument) -> None:
        if self._shard is None:
            number = len(self.journal.shards(self.split))
            self._shard = ShardWriter(self.journal.folder, self.split, number, self.dtype)
        self._shard.write(document.id, document.tokens, document.text_bytes)

    def chunk_ends(self, next_chunk: int, tally: Tally) -> None:
        if self._shard is not None and self._shard.tokens >= self.shard_tokens:
            self.finish(next_chunk, tally)

    def finish(self, next_chunk: int, tally: Tally) -> None:
        """Close the shard, if there is one; all chunks before `next_chunk` are in."""
        if self._shard is not None:
            self.journal.add(Done(self.split, self._shard.close(), next_chunk, tally.as_json()))
            self._shard = None

    def discard(self) -> None:
        if self._shard is not None:
            self._shard.discard()


def _keep(path: Path, content: bytes) -> None:
    with written_whole(path, "wb") as file:
        file.write(content)


def _fingerprint(options: BuildOptions, sources: list[Source]) -> str:
    """Of what decides the bytes of a data set: the options, and the names and sizes of the files. Not of workers."""
    tokenizer = options.trained_size if options.tokenizer is None else Tokenizer.open(options.tokenizer).fingerprint
    parts = [
        [_VERSION, tokenizer, options.end_of_document, options.held_out, options.shard_tokens, options.dtype],
        sorted(options.reading.items()),
        [(source.name, source.size) for source in sources],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _changes(sources: list[Source]) -> str:
    """Changes with each file's time, so that a killed build does not go on over files that were edited since."""
    times = [source.path.stat().st_mtime_ns for source in sources]
    return hashlib.sha256(json.dumps(times).encode()).hexdigest()


def _existing(out: Path, arguments: str) -> Manifest | None:
    """The data set in `out` if it is the one asked for; None if there is none.

    Raises:
        DataError: there is another one.
    """
    if not (out / MANIFEST).exists():
        return None
    manifest = Manifest.read(out)
    if manifest.provenance.get("arguments") != arguments:
        raise DataError(
            f"{out} already holds the data set {manifest.name!r}, built from other input or options: choose another "
            "--out, or remove that folder first"
        )
    return manifest
