"""Make files of raw text a data set where they are: an index of their documents, and a manifest.

    FOLDER/*.tar, *.jsonl                        as they were: webdataset samples with .txt or .json, and JSON lines
    FOLDER/manifest.json, tokenizer.json
    FOLDER/.megatrain/train/text-000000.index    of the first file: where each document lies, and a checksum
    FOLDER/.megatrain/held_out/shard-...         the held-out documents as token shards, since their loss is compared

Nothing is unpacked or copied but the held-out documents. Other formats become token shards (`build`).
"""

import mmap
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np

from megatrain.base.errors import ConfigError, DataError
from megatrain.base.files import sha256_of, written_whole
from megatrain.data.documents import Document, Refused, Source, document_of, document_of_json
from megatrain.data.encoding import hash_fraction, ordered_map
from megatrain.data.journal import Tally
from megatrain.data.manifest import (
    HELD_OUT,
    MANIFEST,
    TEXT,
    TEXT_PLACE,
    TOKENIZER,
    TRAIN,
    Manifest,
    ShardEntry,
    Split,
    TokenizerEntry,
    token_dtype,
)
from megatrain.data.readers.webdataset import Sample, split_name
from megatrain.data.shards import ShardWriter, save_columns
from megatrain.data.sources import find_sources, suffix_of
from megatrain.data.tar import members
from megatrain.data.tokenizer import Tokenizer

FILES = ("*.tar", "*.jsonl", "*.ndjson")
"""What is indexed of a folder."""
_SHARD_TOKENS = 2**26


@dataclass(frozen=True)
class IndexOptions:
    folder: Path
    tokenizer: Path
    end_of_document: str | None = None
    text_field: str = "text"
    held_out: float = 0.01
    workers: int = 1

    def problems(self) -> list[str]:
        found = []
        if not 0 <= self.held_out < 1:
            found.append(f"held_out={self.held_out} is not a share: take one in [0, 1), for example 0.01")
        if self.workers < 1:
            found.append(f"workers={self.workers} must be at least 1")
        return found


@dataclass(frozen=True)
class Span:
    """A document in a file."""

    id: str
    offset: int
    size: int
    is_json: bool


@dataclass(frozen=True)
class _Job:
    source: Source
    text_field: str
    held_out: float


@dataclass
class _Indexed:
    """The documents of a file: those to train on by where they lie, the held-out ones as they are."""

    sha256: str
    size: int
    spans: list[Span] = field(default_factory=list)
    crc32: list[int] = field(default_factory=list)
    held_out: list[Document] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)


def index(options: IndexOptions, watch: Callable[[int], None] = lambda size: None) -> Manifest:
    """Index the text files of a folder; `watch` is told the bytes of each file when it is done.

    Raises:
        ConfigError: an option is not allowed.
        DataError: there are no such files, one is no whole tar, or the folder holds another kind of data set.
    """
    if problems := options.problems():
        raise ConfigError(problems)
    folder = options.folder
    _refuse_token_shards(folder)
    tokenizer = Tokenizer.open(options.tokenizer, options.end_of_document)
    sources = files_of(folder)
    content = options.tokenizer.read_bytes()
    with written_whole(folder / TOKENIZER, "wb") as file:
        file.write(content)
    tally, entries = Tally(), []
    dtype = token_dtype(tokenizer.vocab_size)
    held_out = _HeldOut(folder, tokenizer, dtype)
    jobs = [_Job(source, options.text_field, options.held_out) for source in sources]
    for number, (source, found) in enumerate(zip(sources, ordered_map(_look, jobs, options.workers), strict=True)):
        for refused in found.refused:
            tally.add(refused)
        entries.append(_write(folder, number, source, found))
        for document in found.held_out:
            held_out.write(document)
        watch(found.size)
    train = Split(tuple(entries), form=TEXT, text_field=options.text_field)
    if not train.documents:
        raise DataError(f"nothing to train on in {folder}: {tally.said()}")
    entry = TokenizerEntry(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.end_of_document)
    provenance = {"files": len(sources), "held_out": options.held_out, "refused": tally.as_json()}
    splits = {TRAIN: train, HELD_OUT: Split(tuple(held_out.close()))}
    manifest = Manifest(folder.resolve().name, entry, dtype, splits, provenance)
    manifest.write(folder)
    return manifest


def files_of(folder: Path) -> list[Source]:
    """The files of a folder that can be indexed.

    Raises:
        DataError: it has none, or is no folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: give the folder that the tars or JSON lines are in")
    if not any(path.is_file() for pattern in FILES for path in folder.rglob(pattern)):
        raise DataError(
            f"{folder} has no {', '.join(pattern[1:] for pattern in FILES)} file: other formats, and compressed ones, "
            "become token shards with `megatrain data build`"
        )
    return find_sources([folder], include=FILES)


def _refuse_token_shards(folder: Path) -> None:
    if (folder / MANIFEST).exists() and not Manifest.read(folder).splits[TRAIN].is_text:
        raise DataError(f"{folder} is a data set of token shards already: give a folder of text files")


def spans(source: Source) -> Iterator[Span | Refused]:
    """Where the documents of a file lie."""
    if suffix_of(source.path) == ".tar":
        with open(source.path, "rb") as file:
            for key, parts in groupby(members(file, str(source.path)), key=lambda member: split_name(member.name)[0]):
                sample = Sample.of(f"{source.name}/{key}", list(parts))
                if sample.member is None:
                    yield Refused(sample.id, sample.reason)
                else:
                    yield Span(sample.id, sample.member.offset, sample.member.size, sample.is_json)
        return
    at = 0
    with open(source.path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield Span(f"{source.name}:{number}", at, len(line.rstrip(b"\r\n")), True)
            at += len(line)


def _look(job: _Job) -> _Indexed:
    """Read a file once: which documents are in it, and on which side each falls."""
    path = job.source.path
    found = _Indexed(sha256_of(path), job.source.size)
    if not job.source.size:
        return found
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for span in spans(job.source):
            if isinstance(span, Refused):
                found.refused.append(span)
                continue
            payload = content[span.offset : span.offset + span.size]
            document = (
                document_of_json(span.id, payload, job.text_field, None)
                if span.is_json
                else document_of(span.id, payload)
            )
            if isinstance(document, Refused):
                found.refused.append(document)
            elif hash_fraction(document) < job.held_out:
                found.held_out.append(document)
            else:
                found.spans.append(span)
                found.crc32.append(zlib.crc32(payload))
    return found


def _write(folder: Path, number: int, source: Source, found: _Indexed) -> ShardEntry:
    """Write the index of a file."""
    index = f"{TEXT_PLACE}/{TRAIN}/text-{number:06d}.index"
    (folder / index).parent.mkdir(parents=True, exist_ok=True)
    rows = np.array([(s.offset, s.size, s.is_json) for s in found.spans], dtype=np.int64).reshape(-1, 3)
    columns = {
        "offset": rows[:, 0].copy(),
        "length": rows[:, 1].copy(),
        "is_json": rows[:, 2].copy(),
        "crc32": np.array(found.crc32, dtype=np.int64),
        "text_bytes": rows[:, 1].copy(),
    }
    sha256 = save_columns(folder / index, columns, [span.id for span in found.spans])
    name = source.path.relative_to(folder).as_posix()
    n_bytes = int(rows[:, 1].sum())
    return ShardEntry(name, found.size, found.sha256, len(found.spans), 0, index, sha256, n_bytes)


class _HeldOut:
    """Writes the held-out documents as token shards."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, dtype: str):
        self.folder, self.tokenizer, self.dtype = folder, tokenizer, dtype
        self.done: list[ShardEntry] = []
        self._shard: ShardWriter | None = None

    def write(self, document: Document) -> None:
        if self._shard is None:
            self._shard = ShardWriter(self.folder, f"{TEXT_PLACE}/{HELD_OUT}", len(self.done), self.dtype)
        (ids,) = self.tokenizer.encode_documents([document.text])
        self._shard.write(document.id, ids, len(document.text.encode()))
        if self._shard.tokens >= _SHARD_TOKENS:
            self.close()

    def close(self) -> list[ShardEntry]:
        if self._shard is not None:
            self.done.append(self._shard.close())
            self._shard = None
        return self.done
