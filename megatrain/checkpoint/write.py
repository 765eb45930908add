"""One rank's part of a save: its slices copied to host memory, then written to files with a digest of each."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from megatrain.checkpoint.manifest import StoredFile, StoredSlice, digest_of
from megatrain.checkpoint.storage import Storage
from megatrain.checkpoint.tensorfile import DTYPE_NAMES, MAX_TENSORS, Entry, encode_header
from megatrain.parallel.shard import Box, Slice

CHUNK_BYTES = 16 * 2**20

Fault = Callable[[str], None]
"""Called with the name of each point that a save passes; tests end the process there."""


@dataclass(frozen=True)
class Piece:
    """A slice's description and its bytes in the host buffer."""

    state: str
    name: str
    full_shape: tuple[int, ...]
    matrix: tuple[int, int]
    box: Box
    dtype: torch.dtype
    begin: int

    @property
    def end(self) -> int:
        return self.begin + self.box.numel * self.dtype.itemsize

    @property
    def whole(self) -> bool:
        return self.box == Box(0, self.matrix[0], 0, self.matrix[1])

    @property
    def key(self) -> str:
        """state/name for a tensor that lies here whole, with its rectangle's corner for a part."""
        return f"{self.state}/{self.name}" + ("" if self.whole else f"@{self.box.row},{self.box.column}")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.full_shape if self.whole else (self.box.n_rows, self.box.n_columns)


class Pieces(Protocol):
    """What the files of a rank are written from."""

    pieces: list[Piece]
    """In the order of the files, without gaps."""

    def data(self, begin: int, end: int) -> memoryview:
        """The bytes [begin, end), which lie in one piece."""
        ...


class HostCopy:
    """A rank's slices in host memory, in the order of its files. The buffer is kept from one save to the next."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self.pieces: list[Piece] = []

    @property
    def bytes(self) -> int:
        return self.pieces[-1].end if self.pieces else 0

    def reserve(self, slices: Iterable[Slice]) -> None:
        """Take memory for the counted slices, and touch it: the first save then costs no more than any other."""
        counted = [s.values for s in slices if s.counted]
        self._hold(sum(x.numel() * x.element_size() for x in counted), any(x.device.type != "cpu" for x in counted))
        self._buffer.zero_()

    def _hold(self, n_bytes: int, pinned: bool) -> None:
        if self._buffer.numel() < n_bytes or self._buffer.is_pinned() != pinned:
            self._buffer = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=pinned)

    @torch.no_grad()
    def take(self, slices: Iterable[Slice]) -> None:
        """Copy the counted slices. When this returns, their memory may change."""
        # Wide dtypes first, so that each tensor begins on a multiple of its width.
        counted = sorted(
            (s for s in slices if s.counted),
            key=lambda s: (-s.values.dtype.itemsize, s.state, s.name, s.box.row, s.box.column),
        )
        pieces, at = [], 0
        for s in counted:
            pieces.append(Piece(s.state, s.name, tuple(s.full_shape), s.matrix, s.box, s.values.dtype, at))
            at = pieces[-1].end
        devices = {s.values.device for s in counted if s.values.device.type != "cpu"}
        self._hold(at, bool(devices))
        for s, piece in zip(counted, pieces, strict=True):
            copy = self._buffer[piece.begin : piece.end].view(piece.dtype).view(s.values.shape)
            copy.copy_(s.values, non_blocking=True)
        for device in devices:
            torch.accelerator.synchronize(device)
        self.pieces = merged(pieces)

    def data(self, begin: int, end: int) -> memoryview:
        return self._buffer[begin:end].numpy().data


def merged(pieces: Iterable[Piece]) -> list[Piece]:
    """Pieces that lie behind one another in the buffer and in their tensor as one: q, k and v of a fused weight."""
    found: list[Piece] = []
    for piece in pieces:
        found.append(piece)
        while len(found) > 1 and (box := _joined(found[-2], found[-1])):
            del found[-1]
            found[-1] = replace(found[-1], box=box)
    return found


def _joined(a: Piece, b: Piece) -> Box | None:
    """The one rectangle that two pieces make, if they do and its bytes are theirs in order."""
    if (a.state, a.name, a.dtype) != (b.state, b.name, b.dtype):
        return None
    x, y = a.box, b.box
    if x.row == y.row and x.n_rows == y.n_rows == 1 and x.column + x.n_columns == y.column:
        return Box(x.row, 1, x.column, x.n_columns + y.n_columns)
    if (x.column, x.n_columns) == (y.column, y.n_columns) and x.row + x.n_rows == y.row:
        return Box(x.row, x.n_rows + y.n_rows, x.column, x.n_columns)
    return None


@dataclass
class Written:
    """What a rank wrote: its files, and the slices by tensor."""

    files: list[StoredFile]
    slices: list[tuple[Piece, StoredSlice]]

    def plain(self) -> Any:
        return {
            "files": [[f.name, f.bytes, f.header_bytes, f.header_digest] for f in self.files],
            "slices": [
                [
                    p.state, p.name, p.full_shape, p.matrix, DTYPE_NAMES[p.dtype],
                    [s.file, s.begin, s.box.row, s.box.n_rows, s.box.column, s.box.n_columns, s.digest],
                ]
                for p, s in self.slices
            ],
        }  # fmt: skip


def write_files(
    copy: Pieces, storage: Storage, folder: str, rank: int, file_bytes: int, fault: Fault, first: int = 0
) -> Written:
    """Write a rank's files into `folder`.

    Args:
        file_bytes: a file is closed before it grows beyond this; a tensor is never cut, so one may be larger.
        first: number of the first file.
    """
    written = Written([], [])
    for n, pieces in enumerate(_files(copy.pieces, file_bytes), first):
        file = f"rank-{rank:05d}-{n:03d}.safetensors"
        origin = pieces[0].begin
        entries = [Entry(p.key, p.dtype, p.shape, p.begin - origin, p.end - origin) for p in pieces]
        header = encode_header(entries, {"format": "pt"})
        digests: list[str] = []
        storage.write(f"{folder}/{file}", _chunks(header, pieces, copy, digests, fault))
        written.files.append(StoredFile(file, len(header) + pieces[-1].end - origin, len(header), digest_of(header)))
        for piece, digest in zip(pieces, digests, strict=True):
            written.slices.append((piece, StoredSlice(file, len(header) + piece.begin - origin, piece.box, digest)))
        fault("after a file")
    return written


def _files(pieces: list[Piece], file_bytes: int) -> Iterator[list[Piece]]:
    file: list[Piece] = []
    for piece in pieces:
        if file and (piece.end - file[0].begin > file_bytes or len(file) == MAX_TENSORS):
            yield file
            file = []
        file.append(piece)
    if file:
        yield file


def _chunks(header: bytes, pieces: list[Piece], copy: Pieces, digests: list[str], fault: Fault) -> Iterator[memoryview]:
    """The bytes of a file; each piece's digest is taken from memory on the way, before the file system sees it."""
    yield memoryview(header)
    for n, piece in enumerate(pieces):
        if n == len(pieces) // 2:
            fault("in the middle of a file")
        digest = hashlib.sha256()
        for begin in range(piece.begin, piece.end, CHUNK_BYTES):
            chunk = copy.data(begin, min(begin + CHUNK_BYTES, piece.end))
            digest.update(chunk)
            yield chunk
        digests.append(digest.hexdigest())


def assemble(reports: Iterable[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The manifest's `files` and `tensors`, in its plain form, from what all ranks report (`Written.plain`)."""
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for report in reports:
        files |= {name: row for name, *row in report["files"]}
        for state, name, shape, matrix, dtype, row in report["slices"]:
            known = tensors.setdefault(state, {}).setdefault(
                name, {"shape": shape, "matrix": matrix, "dtype": dtype, "slices": []}
            )
            if (known["shape"], known["matrix"], known["dtype"]) != (shape, matrix, dtype):
                raise ValueError(
                    f"ranks disagree about {state}/{name}: {known['shape']} {known['dtype']}, {shape} {dtype}"
                )
            known["slices"].append(row)
    return files, tensors
