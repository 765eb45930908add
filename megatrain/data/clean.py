"""Clean a corpus: leave out what is no good to train on, and record each document that was left out with its reason.

Documents are judged one by one (rules of quality, evaluation sets) in many processes, then compared with those kept
before (duplicates) in one. The first of several copies is kept. What comes out does not depend on the processes.
"""

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any

import zstandard

from megatrain.base.errors import ConfigError, DataError
from megatrain.base.files import fsync_folder, write_json
from megatrain.data.build import Silent, Watcher
from megatrain.data.contamination import Benchmarks, read_benchmarks
from megatrain.data.documents import Chunk, Document, Refused
from megatrain.data.duplicates import Exact, Near, Signature, content_digest, require_datasketch, signature
from megatrain.data.encoding import ordered_map
from megatrain.data.quality import Drop, first_broken, parse_rule
from megatrain.data.sources import chunks_of, find_sources, reading_problems
from megatrain.data.words import word_hashes, words

_FILE_BYTES = 2**28  # of text in one file of kept documents


@dataclass(frozen=True)
class CleanOptions:
    """What to clean and how."""

    inputs: tuple[Path, ...]
    out: Path
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    """Rules of quality, "kind" or "kind:limit=value,..."."""
    against: tuple[Path, ...] = ()
    """Evaluation sets that must not be trained on."""
    ngram: int = 13
    """Words in a row that a document may not share with them."""
    shortest: int = 6
    """Words of the shortest sentence of them that is looked for as a whole."""
    near: float = 0.8
    """Least resemblance of near duplicates; 0 looks for exact ones only."""
    reading: dict[str, Any] = field(default_factory=dict)
    workers: int = 1

    def problems(self) -> list[str]:
        found = []
        if not 0 <= self.near <= 1:
            found.append(f"near={self.near} is no resemblance: take one in (0, 1], for example 0.8, or 0 for none")
        if not 1 <= self.shortest <= self.ngram:
            found.append(f"shortest={self.shortest} and ngram={self.ngram}: take 1 <= shortest <= ngram")
        if self.workers < 1:
            found.append(f"workers={self.workers} must be at least 1")
        found += reading_problems(self.reading)
        for rule in self.rules:
            try:
                parse_rule(rule)
            except ConfigError as error:
                found += error.problems
        return found


@dataclass(frozen=True)
class Cleaned:
    kept: int
    dropped: Counter[str]
    """Documents by the reason for which they were left out."""


@dataclass(frozen=True)
class _BenchmarkKey:
    """Which evaluation sets, as they are now: each process reads them once, and again when a file has changed."""

    against: tuple[Path, ...]
    ngram: int
    shortest: int
    times: tuple[int, ...]

    @classmethod
    def of(cls, options: CleanOptions) -> "_BenchmarkKey":
        times = (source.path.stat().st_mtime_ns for path in options.against for source in find_sources([path]))
        return cls(options.against, options.ngram, options.shortest, tuple(times))


@dataclass(frozen=True)
class _Job:
    chunk: Chunk
    rules: tuple[str, ...]
    benchmarks: _BenchmarkKey
    near: bool


@dataclass(frozen=True)
class _Judged:
    """A document that may be kept, as far as can be seen from it alone, or why not."""

    id: str
    drop: Drop | None
    text: str = ""
    digest: bytes = b""
    signature: Signature | None = None


def clean(options: CleanOptions, watcher: Watcher | None = None) -> Cleaned:
    """Write the documents to keep to `out`/kept/, and to `out`/dropped.jsonl why the others went.

    Raises:
        ConfigError: an option is not allowed.
        DataError: the input, an evaluation set or the output folder is not as it must be.
    """
    if problems := options.problems():
        raise ConfigError(problems)
    watcher = watcher or Silent()
    sources = find_sources(options.inputs, options.include, options.exclude)
    if options.near:
        require_datasketch()
    benchmarks = _BenchmarkKey.of(options)
    n_passages = len(_benchmarks(benchmarks))
    if options.against and not n_passages:
        raise DataError(
            f"the evaluation sets hold no sentence of {options.shortest} words: give others, or a smaller --shortest"
        )
    watcher.stage("cleaning", sum(source.size for source in sources))
    jobs = (_Job(chunk, options.rules, benchmarks, options.near > 0) for chunk in chunks_of(sources, options.reading))
    exact, near = Exact(), Near(options.near) if options.near else None
    with (
        _published(options.out) as folder,
        _Kept(folder / "kept") as kept,
        open(folder / "dropped.jsonl", "w") as dropped,
    ):
        counts: Counter[str] = Counter()
        for judged, size in ordered_map(_judge, jobs, options.workers):
            for document in judged:
                drop = document.drop or _duplicate(document, exact, near)
                if drop is None:
                    kept.write(document.id, document.text)
                    continue
                counts[drop.reason] += 1
                row = {"id": document.id, "reason": drop.reason, "detail": drop.detail}
                dropped.write(json.dumps(row, ensure_ascii=False) + "\n")
            watcher.advance(size, 0)
        report = {"kept": kept.documents, "dropped": dict(counts.most_common()), "passages": n_passages}
        write_json(folder / "report.json", report | {"options": _as_json(options)})
    return Cleaned(kept.documents, counts)


def _judge(job: _Job) -> tuple[list[_Judged], int]:
    rules = [parse_rule(rule) for rule in job.rules]
    benchmarks = _benchmarks(job.benchmarks)
    judged = [_judge_document(found, rules, benchmarks, job.near) for found in job.chunk.documents()]
    return judged, job.chunk.size


@cache
def _benchmarks(key: _BenchmarkKey) -> Benchmarks:
    return Benchmarks(read_benchmarks(key.against), key.ngram, key.shortest)


def _judge_document(found: Document | Refused, rules: list[Any], benchmarks: Benchmarks, near: bool) -> _Judged:
    if isinstance(found, Refused):
        return _Judged(found.id, Drop(f"unreadable: {found.reason}", ""))
    if found.tokens is not None:
        raise DataError(f"{found.id} holds token ids: cleaning reads text, so give the text they were made from")
    if (drop := first_broken(rules, found.text)) is not None:
        return _Judged(found.id, drop)
    in_words = words(found.text) if near or len(benchmarks) else []
    hashes = word_hashes(in_words)
    if (hit := benchmarks.find(in_words, hashes)) is not None:
        return _Judged(found.id, Drop("contaminated", f"{hit.item}: {hit.passage}"))
    return _Judged(
        found.id, None, found.text, content_digest(found.text), signature(hashes) if near and len(hashes) else None
    )


def _duplicate(document: _Judged, exact: Exact, near: Near | None) -> Drop | None:
    """Why this document is a duplicate of one before; remembers it if it is not."""
    if (earlier := exact.find(document.digest)) is not None:
        return Drop("duplicate", f"of {earlier}")
    if near is not None and document.signature is not None:
        if (found := near.find(document.signature)) is not None:
            return Drop("near duplicate", f"of {found[0]}, resemblance {found[1]:.2f}")
        near.add(document.signature, document.id)
    exact.add(document.digest, document.id)
    return None


class _Kept:
    """Writes the documents that are kept, as JSON lines in files of limited size."""

    def __init__(self, folder: Path):
        self.folder, self.documents = folder, 0
        self._files, self._bytes = 0, 0
        self._stream: IO[bytes] | None = None

    def write(self, id: str, text: str) -> None:
        if self._stream is None:
            path = self.folder / f"part-{self._files:05d}.jsonl.zst"
            self.folder.mkdir(exist_ok=True)
            self._stream = zstandard.ZstdCompressor().stream_writer(open(path, "wb"))  # noqa: SIM115
            self._files, self._bytes = self._files + 1, 0
        line = json.dumps({"id": id, "text": text}, ensure_ascii=False).encode() + b"\n"
        self._stream.write(line)
        self.documents += 1
        self._bytes += len(line)
        if self._bytes >= _FILE_BYTES:
            self.close()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()  # ends the frame and closes the file
            self._stream = None

    def __enter__(self) -> "_Kept":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def _published(out: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `out` at the end, or is removed if it does not come to that."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} is there already and not empty: choose another --out, or remove it first")
    aside = out.with_name(f".{out.name}.{os.getpid()}.cleaning")
    try:
        aside.mkdir(parents=True)
        yield aside
        os.rename(aside, out)
        fsync_folder(out.parent)
    except OSError as error:
        raise DataError(f"{out} cannot be written ({error.strerror or error}): give another --out") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _as_json(options: CleanOptions) -> dict[str, Any]:
    """The options that decide what is kept."""
    return {
        "inputs": [str(path) for path in options.inputs],
        "include": options.include,
        "exclude": options.exclude,
        "rules": options.rules,
        "against": [str(path) for path in options.against],
        "ngram": options.ngram,
        "shortest": options.shortest,
        "near": options.near,
    }
