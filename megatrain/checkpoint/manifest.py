"""The manifest: what a checkpoint holds, where each slice lies, and the digest it had in memory when it was written."""

import bisect
import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from megatrain.base.errors import CheckpointError, FailedCheckpointError
from megatrain.checkpoint.tensorfile import DTYPES
from megatrain.parallel.shard import Box

MANIFEST, COMMIT = "manifest.json", "COMMIT"

FORMAT = "megatrain checkpoint"
VERSION = 1

MAX_MANIFEST_BYTES = 256 * 2**20
"""A larger manifest is refused unread."""

_KEYS = {"format", "version", "step", "facts", "state", "files", "tensors"}
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StoredFile:
    name: str
    bytes: int
    header_bytes: int
    """With the 8 bytes of its length: where the tensors begin."""
    header_digest: str


@dataclass(frozen=True)
class StoredSlice:
    """A rectangle of a full tensor, as one rank wrote it. `begin` is bytes from the start of the file."""

    file: str
    begin: int
    box: Box
    digest: str


@dataclass(frozen=True)
class StoredTensor:
    """A full tensor and the slices that tile its matrix."""

    shape: tuple[int, ...]
    matrix: tuple[int, int]
    dtype: torch.dtype
    slices: tuple[StoredSlice, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint but the values. Tensors are found by (state, name)."""

    step: int
    state: Any
    """Where the run stood: tokens, cursors, schedule, the engine's scalars; any JSON."""
    facts: dict[str, Any]
    """What wrote it: run, config, tokenizer, lineage, revision, versions, score."""
    files: dict[str, StoredFile]
    tensors: dict[tuple[str, str], StoredTensor]
    digest: str = field(default="", compare=False)


def encode(step: int, state: Any, facts: dict[str, Any], files: dict[str, Any], tensors: dict[str, Any]) -> bytes:
    """The manifest's bytes. `files` and `tensors` are in the plain form that `decode` reads (see `write.assemble`)."""
    value = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "facts": facts,
        "state": state,
        "files": files,
        "tensors": tensors,
    }
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def digest_of(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def decode(text: bytes, where: str) -> Manifest:
    """The manifest from its bytes, checked: names, shapes, that slices fill their files and tile their tensors.

    Raises:
        CheckpointError: it is of a newer version or anything in it is not as it must be.
    """
    try:
        value = json.loads(text)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ValueError(f"it is not a {FORMAT}")
        if type(value.get("version")) is not int or not 1 <= value["version"] <= VERSION:
            raise CheckpointError(
                f"{where} has format version {value.get('version')!r} and this megatrain reads up to {VERSION}: "
                "use the version that wrote it, or a newer one"
            )
        if set(value) != _KEYS:
            raise ValueError(f"its keys are {sorted(value)} and must be {sorted(_KEYS)}")
        files = {name: _file(name, row) for name, row in value["files"].items()}
        tensors = {
            (state, name): _tensor(f"{state}/{name}", row, files)
            for state, named in value["tensors"].items()
            for name, row in named.items()
        }
        _refuse_gaps(files, tensors.values())
        step, facts = value["step"], value["facts"]
        if not _count(step) or not isinstance(facts, dict):
            raise ValueError("step or facts are missing")
        for fact, kind in (("origin", dict), ("lineage", list)):
            if not isinstance(facts.get(fact, kind()), kind):
                raise ValueError(f"its {fact} is {facts[fact]!r}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FailedCheckpointError(f"{where} is damaged: {error or 'nested too deep'}") from None
    return Manifest(step, value["state"], facts, files, tensors, digest_of(text))


def _file(name: str, row: Any) -> StoredFile:
    size, header_bytes, digest = row
    if not _FILE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no file name of a checkpoint")
    if not (_count(size) and _count(header_bytes) and header_bytes <= size and _DIGEST.fullmatch(digest)):
        raise ValueError(f"{name} is not described by its bytes and digest")
    return StoredFile(name, size, header_bytes, digest)


def _tensor(label: str, row: Any, files: dict[str, StoredFile]) -> StoredTensor:
    shape, matrix, dtype = tuple(row["shape"]), tuple(row["matrix"]), DTYPES[row["dtype"]]
    if not all(map(_count, (*shape, *matrix))) or len(matrix) != 2 or math.prod(shape) != math.prod(matrix):
        raise ValueError(f"{label} has shape {shape} and matrix {matrix}")
    slices = []
    for file, begin, row_, n_rows, column, n_columns, digest in row["slices"]:
        box = Box(row_, n_rows, column, n_columns)
        if not all(map(_count, (begin, row_, n_rows, column, n_columns))) or not _DIGEST.fullmatch(digest):
            raise ValueError(f"{label} has a slice that is not described by counts and a digest")
        if begin < files[file].header_bytes or begin + box.numel * dtype.itemsize > files[file].bytes:
            raise ValueError(f"a slice of {label} lies outside of {file}")
        slices.append(StoredSlice(file, begin, box, digest))
    if problem := tiling_problem(matrix, [s.box for s in slices]):
        raise ValueError(f"{label}: {problem}")
    return StoredTensor(shape, matrix, dtype, tuple(slices))


def _refuse_gaps(files: dict[str, StoredFile], tensors: Iterable[StoredTensor]) -> None:
    """Every byte of a file belongs to the header or to one slice, so that every byte has a digest."""
    spans: dict[str, list[tuple[int, int]]] = {name: [(0, f.header_bytes)] for name, f in files.items()}
    for tensor in tensors:
        for s in tensor.slices:
            spans[s.file].append((s.begin, s.begin + s.box.numel * tensor.dtype.itemsize))
    for name, found in spans.items():
        at = 0
        for begin, end in sorted(found):
            if begin != at:
                raise ValueError(f"{name} has bytes at {min(begin, at)} that belong to no slice or to two")
            at = end
        if at != files[name].bytes:
            raise ValueError(f"{name} has {files[name].bytes} bytes and its slices end at {at}")


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def tiling_problem(matrix: tuple[int, int], boxes: Iterable[Box]) -> str:
    """Why `boxes` do not cover every element of a matrix exactly once, or "" if they do.

    A line sweeps down the rows; the column ranges that it crosses are kept sorted. O(n log n) in the number of boxes.
    """
    boxes = [box for box in boxes if box.numel]
    for box in boxes:
        if box.row + box.n_rows > matrix[0] or box.column + box.n_columns > matrix[1]:
            return f"{box} lies outside of the {matrix[0]} x {matrix[1]} elements"
    events = [(box.row + box.n_rows, 0, box) for box in boxes] + [(box.row, 1, box) for box in boxes]
    crossed: list[tuple[int, int]] = []  # (first column, end) of the boxes under the line
    for _, begins, box in sorted(events, key=lambda e: e[:2]):  # a box that ends makes room first
        columns = (box.column, box.column + box.n_columns)
        at = bisect.bisect_left(crossed, columns)
        if not begins:
            del crossed[at]
            continue
        left_overlaps = at > 0 and crossed[at - 1][1] > columns[0]
        right_overlaps = at < len(crossed) and crossed[at][0] < columns[1]
        if left_overlaps or right_overlaps:
            return f"{box} is written twice"
        crossed.insert(at, columns)
    covered, wanted = sum(box.numel for box in boxes), math.prod(matrix)
    return "" if covered == wanted else f"{covered} of {wanted} elements were written"
