"""Token data sets of Megatron-LM: PREFIX.bin holds the ids, PREFIX.idx where sequences and documents begin.

The .idx, little-endian: the magic, u64 version 1, u8 code of the type of ids, u64 sequences, u64 entries of the
document table, then i32 lengths and i64 byte offsets of the sequences, and i64 first sequence of each document with the
number of sequences as the last entry.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from megatrain.base.errors import DataError
from megatrain.data.documents import CHUNK_BYTES, READER, Document, Refused, Source
from megatrain.data.readers.text import Files

_MAGIC = b"MMIDIDX\x00\x00"
_HEAD = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floating point: no ids


@READER.register("megatron")
@dataclass(frozen=True)
class Megatron:
    """Named by either file of the pair; the ids are kept, so the tokenizer that made them must be given."""

    chunk_bytes: int = CHUNK_BYTES

    suffixes: ClassVar[tuple[str, ...]] = (".bin", ".idx")

    def chunks(self, sources: Sequence[Source]) -> Iterator["Range | Files"]:
        given = {source.path for source in sources}
        for source in sources:
            ids, table = source.path.with_suffix(".bin"), source.path.with_suffix(".idx")
            if not (ids.exists() and table.exists() and _has_magic(table)):
                yield Files((source,))  # some other file of this name
            elif source.path == table and ids in given:
                yield Range(ids, source.name, 0, 0, source.size)  # its documents come with the .bin
            else:
                yield from self._cut(source, ids)

    def _cut(self, source: Source, ids: Path) -> Iterator["Range"]:
        index = Index.read(ids)
        first, left = 0, source.size
        n_documents = len(index.documents) - 1
        bytes_before = np.concatenate([[0], np.cumsum(index.lengths, dtype=np.int64)])[index.documents]
        bytes_before *= index.dtype.itemsize
        while first < n_documents:
            wanted = bytes_before[first] + self.chunk_bytes // 2  # an id of two bytes stands for about four of text
            stop = int(np.searchsorted(bytes_before, wanted).clip(first + 1, n_documents))
            size = left if stop == n_documents else min(left, int(bytes_before[stop] - bytes_before[first]))
            yield Range(ids, source.name, first, stop, size)
            first, left = stop, left - size


def _has_magic(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


@dataclass(frozen=True)
class Range:
    """Documents `first` .. `stop` - 1 of a pair of files."""

    path: Path
    """The .bin."""
    name: str
    first: int
    stop: int
    size: int

    def documents(self) -> Iterator[Document | Refused]:
        if self.first == self.stop:
            return
        index = Index.read(self.path)
        for number in range(self.first, self.stop):
            id = f"{self.name}:{number}"
            tokens = index.tokens(number)
            yield Document(id, tokens=tokens) if len(tokens) else Refused(id, "empty")


@dataclass(frozen=True)
class Index:
    """The table of a pair, checked against the size of its .bin."""

    path: Path
    """The .bin."""
    dtype: np.dtype
    lengths: NDArray[np.int32]
    """Of each sequence in ids."""
    offsets: NDArray[np.int64]
    """Of each sequence in the .bin, in bytes."""
    documents: NDArray[np.int64]
    """First sequence of each document, and the number of sequences."""

    @classmethod
    def read(cls, path: Path) -> "Index":
        """The table beside the .bin at `path`.

        Raises:
            DataError: it is cut, of another version, or does not fit the .bin.
        """
        table = path.with_suffix(".idx")
        content = np.memmap(table, dtype=np.uint8, mode="r")
        if len(content) < _HEAD.size:
            raise DataError(f"{table} is cut: it has {len(content)} bytes; get the file again")
        _, version, code, n_sequences, n_documents = _HEAD.unpack(content[: _HEAD.size].tobytes())
        if version != 1 or code not in _DTYPES:
            raise DataError(
                f"{table} has version {version} and type code {code}: version 1 with whole numbers (codes "
                f"{', '.join(map(str, _DTYPES))}) can be read; make the data set again with a current Megatron-LM"
            )
        parts, at = [], _HEAD.size
        for dtype, length in (("<i4", n_sequences), ("<i8", n_sequences), ("<i8", n_documents)):
            end = at + length * np.dtype(dtype).itemsize
            if end > len(content):
                raise DataError(f"{table} is cut: it lists {n_sequences} sequences and ends before; get the file again")
            parts.append(np.frombuffer(content, dtype=dtype, count=length, offset=at))
            at = end
        found = cls(path, np.dtype(_DTYPES[code]), *parts)
        if problem := found._problem(path.stat().st_size):
            raise DataError(f"{table} does not fit {path.name}: {problem}; get both files again")
        return found

    def _problem(self, size: int) -> str | None:
        if (self.lengths < 0).any() or (self.offsets < 0).any():
            return "it holds negative places"
        if len(self.lengths) and (self.offsets + self.lengths.astype(np.int64) * self.dtype.itemsize).max() > size:
            return f"it places sequences beyond the {size} bytes there are"
        table = self.documents
        if not len(table) or table[0] != 0 or table[-1] != len(self.lengths) or (np.diff(table) < 0).any():
            return "its document table does not cover its sequences in order"
        return None

    def tokens(self, number: int) -> NDArray[np.uint32]:
        """The ids of a document, of all its sequences."""
        sequences = range(self.documents[number], self.documents[number + 1])
        with open(self.path, "rb") as file:
            parts = [_read(file, self.dtype, int(self.offsets[i]), int(self.lengths[i])) for i in sequences]
        ids = np.concatenate(parts) if parts else np.zeros(0, self.dtype)
        if len(ids) and ids.min() < 0:
            raise DataError(
                f"document {number} of {self.path} has the id {ids.min()}: ids are not negative; get it again"
            )
        return ids.astype(np.uint32)


def _read(file, dtype: np.dtype, offset: int, length: int) -> NDArray:
    file.seek(offset)
    return np.frombuffer(file.read(length * dtype.itemsize), dtype=dtype)
