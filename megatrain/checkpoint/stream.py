"""A checkpoint written by one process, tensor by tensor: how converted and averaged models are made.

Memory holds one file's tensors at a time, once.
"""

import bisect
import contextlib
import functools
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.base.errors import CheckpointError, DataError
from megatrain.base.files import fsync_folder
from megatrain.checkpoint.compare import differences
from megatrain.checkpoint.manifest import COMMIT, MANIFEST, decode, digest_of, encode
from megatrain.checkpoint.model import other_meanings
from megatrain.checkpoint.origin import origin
from megatrain.checkpoint.read import Commit, Reader, find, only_weights
from megatrain.checkpoint.storage import LocalStorage, new_place, refusal
from megatrain.checkpoint.tensorfile import Entry, encode_header
from megatrain.checkpoint.tokenizer import entry_of, side_files, tokenizer_of
from megatrain.checkpoint.write import Piece, assemble, write_files
from megatrain.data.manifest import TOKENIZER
from megatrain.parallel.shard import Box

FILE_BYTES = 512 * 2**20

Named = tuple[str, str, Tensor]
"""state, name, full tensor."""


class WholeTensors:
    """Whole tensors as the pieces of a file, written from where they lie."""

    def __init__(self, tensors: Iterable[Named]):
        self.pieces: list[Piece] = []
        self._begins: list[int] = []
        self._bytes: list[memoryview] = []
        at = 0
        for state, name, x in sorted(tensors, key=lambda named: (-named[2].element_size(), *named[:2])):
            box = Box(0, 1, 0, x.numel())
            self.pieces.append(Piece(state, name, tuple(x.shape), (1, x.numel()), box, x.dtype, at))
            self._begins.append(at)
            self._bytes.append(bytes_of(x))
            at = self.pieces[-1].end

    def data(self, begin: int, end: int) -> memoryview:
        """Bytes of one piece."""
        n = bisect.bisect_right(self._begins, begin) - 1
        return self._bytes[n][begin - self._begins[n] : end - self._begins[n]]


def bytes_of(x: Tensor) -> memoryview:
    """A tensor's bytes in order, of the same memory where it is contiguous."""
    return x.contiguous().view(-1).view(torch.uint8).numpy().data


def write_checkpoint(
    folder: str | Path,
    tensors: Iterable[Named],
    *,
    step: int,
    state: Any,
    facts: dict[str, Any],
    file_bytes: int = FILE_BYTES,
    beside: Mapping[str, bytes] | None = None,
) -> Commit:
    """Write `tensors` as the checkpoint `folder`, which appears when it is whole.

    Args:
        file_bytes: about the largest file, and what is in memory at a time.
        beside: other files of the folder, by name: a tokenizer.

    Raises:
        CheckpointError: the folder exists, or there is no room.
    """
    folder = new_place(folder)
    storage, staging = LocalStorage(folder.parent), f".{folder.name}.partial"
    reports: list[Any] = []
    try:
        storage.prepare(staging)
        for batch in _batches(tensors, file_bytes):
            held, n = WholeTensors(batch), sum(len(report["files"]) for report in reports)
            batch.clear()
            reports.append(write_files(held, storage, staging, 0, 2 * file_bytes, lambda point: None, n).plain())
            del held
        for name, content in (beside or {}).items():
            storage.write(f"{staging}/{name}", [content])
        text = encode(step, state, facts | {"origin": origin(1)}, *assemble(reports))
        decode(text, f"the manifest of {folder}")
        storage.write(f"{staging}/{MANIFEST}", [text])
        storage.write(f"{staging}/{COMMIT}", [digest_of(text).encode() + b"\n"])
        storage.publish(staging, folder.name)
    except OSError as error:
        shutil.rmtree(folder.parent / staging, ignore_errors=True)
        raise refusal(error, f"writing {folder}", storage) from None
    except BaseException:
        shutil.rmtree(folder.parent / staging, ignore_errors=True)
        raise
    return Commit.open(storage, folder.name)


def _batches(tensors: Iterable[Named], file_bytes: int) -> Iterator[list[Named]]:
    """Tensors in order, as many together as one file takes."""
    batch: list[Named] = []
    held = 0
    for named in tensors:
        size = named[2].numel() * named[2].element_size()
        if batch and held + size > file_bytes:
            yield batch
            batch, held = [], 0
        batch.append(named)
        held += size
        del named
    if batch:
        yield batch


def consolidate(reader: Reader, path: str | Path) -> int:
    """All weights in one safetensors file, under their plain names, read by any program; returns its bytes.

    One tensor is in memory at a time.
    """
    path = new_place(path, "file")
    entries, at = [], 0
    held = [(name, reader.stored(name)) for name in reader.names("weights")]
    for name, stored in sorted(held, key=lambda pair: (-pair[1].dtype.itemsize, pair[0])):
        n_bytes = stored.matrix[0] * stored.matrix[1] * stored.dtype.itemsize
        entries.append(Entry(name, stored.dtype, stored.shape, at, at + n_bytes))
        at += n_bytes
    header = encode_header(entries, {"format": "pt"})

    def chunks() -> Iterator[bytes | memoryview]:
        yield header
        for entry in entries:
            yield bytes_of(reader.read_full(entry.key))

    storage, aside = LocalStorage(path.parent), f".{path.name}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / aside).unlink(missing_ok=True)
        storage.write(aside, chunks())
        (path.parent / aside).rename(path)
        fsync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            (path.parent / aside).unlink(missing_ok=True)
        raise refusal(error, f"writing {path}", storage, len(header) + at) from None
    return len(header) + at


CANCELLED = 1e-3
"""Shares whose sum is this part of them or less, since some are negative, make noise large and no mean."""


def average(places: list[str | Path], folder: str | Path, shares: list[float] | None = None) -> Commit:
    """The mean of several checkpoints' weights as a checkpoint of weights alone, for `init_from` and `generate`.

    Sums are taken in float64 and rounded once, to the widest format of them; what lies beside the weights of the last
    step (a tokenizer) is kept. Paper: Wortsman et al. 2022, arXiv:2203.05482 (model soups).

    Args:
        shares: of each checkpoint; their sum is finite and not next to nothing beside them. Equal by default.

    Raises:
        CheckpointError: they are not of the same model, or the shares are not such.
    """
    commits = [find(place, states=only_weights) for place in places]
    readers = [commit.reader() for commit in commits]
    shares = shares or [1.0] * len(readers)
    if len(shares) != len(readers):
        raise CheckpointError(f"{len(shares)} shares for {len(readers)} checkpoints: give each one")
    if not math.isfinite(sum(shares)) or abs(sum(shares)) <= CANCELLED * sum(map(abs, shares)):
        raise CheckpointError(
            f"shares {shares} add up to {sum(shares)}: it must be a finite number, and not next to nothing"
        )
    for place, reader in zip(places, readers, strict=True):
        if found := _why_apart(reader, readers[0]):
            raise CheckpointError(f"{place} and {places[0]} are not of the same model ({found}): average those of one")

    def tensors() -> Iterator[Named]:
        for name in readers[0].names():
            total = torch.zeros(readers[0].stored(name).shape, dtype=torch.float64)
            for share, reader in zip(shares, readers, strict=True):
                total += share * reader.read_full(name)
            widest = functools.reduce(torch.promote_types, (reader.stored(name).dtype for reader in readers))
            yield "weights", name, (total / sum(shares)).to(widest)

    last = max(readers, key=lambda reader: reader.step)
    line = {"averaged": [[c.storage.describe(c.folder), c.digest] for c in commits], "shares": shares}
    facts = {k: last.facts.get(k) for k in ("config", "tokenizer")} | {
        "lineage": [*(last.facts.get("lineage") or []), line]
    }
    beside = side_files(last.commit)
    if TOKENIZER not in beside:
        with contextlib.suppress(CheckpointError, DataError):  # none is found, or the run's data is not told
            beside[TOKENIZER] = tokenizer_of(last.commit)[1]
    return write_checkpoint(folder, tensors(), step=last.step, state=None, facts=facts, beside=beside)


def _why_apart(a: Reader, b: Reader) -> str:
    """Why the mean of two checkpoints' weights would be of no model; "" where it is of one."""
    if found := differences(a.shapes(), b.shapes()):
        return "; ".join(found)
    sections = [dict(reader.facts.get("config") or {}).get("model") or {} for reader in (a, b)]
    if found := [f"model.{key} is {mine} and {theirs}" for key, (mine, theirs) in other_meanings(*sections).items()]:
        return "; ".join(found)
    tokenizers = {entry_of(reader.facts).get("fingerprint") for reader in (a, b)}
    return "their tokenizers differ" if len(tokenizers) > 1 else ""
