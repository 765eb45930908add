"""Rows being filled: token ids copied out of shards, then everything a `Batch` holds worked out for all rows at once.

A document is stored with its end-of-document token last, and trained on with that token first: the row reads
`E d0 d1 .. dn` and its targets are `d0 d1 .. dn E`. So the targets are the stored stream itself, every token has a
target within its own document, nothing is predicted across documents, and to generate a document is to begin with E.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatrain.base.errors import DataError
from megatrain.data.corpus import Stretch

NAMES = {"tokens": np.int64, "targets": np.int64, "weights": np.float32, "positions": np.int64, "documents": np.int32}
"""The arrays of a `Batch` and their types; all are [rows, seq]."""

Arrays = dict[str, NDArray]


def arrays_in(buffer: bytearray | memoryview, n_rows: int, seq_len: int) -> Arrays:
    """The arrays of a batch as views of `buffer`, one after the other."""
    found, offset = {}, 0
    for name, dtype in NAMES.items():
        found[name] = np.frombuffer(buffer, dtype, n_rows * seq_len, offset).reshape(n_rows, seq_len)
        offset += found[name].nbytes
    return found


def empty(n_rows: int, seq_len: int) -> Arrays:
    """The arrays of a batch, to be filled."""
    return {name: np.empty((n_rows, seq_len), dtype) for name, dtype in NAMES.items()}


def n_bytes(n_rows: int, seq_len: int) -> int:
    return n_rows * seq_len * sum(np.dtype(dtype).itemsize for dtype in NAMES.values())


@dataclass(frozen=True)
class Written:
    """A stretch that was put into a row, kept to say later which documents the row holds."""

    row: int
    column: int
    stretch: Stretch
    documents: slice
    """Places of its documents in the order of the shuffled shard."""


class Rows:
    """The rows of one batch while they are filled.

    rows = Rows(arrays, end_of_document)
    column = rows.put(row, 0, stretch)     # for each stretch of each row
    packed = rows.finish(mask_documents)
    """

    def __init__(self, arrays: Arrays, end_of_document: int):
        self.arrays, self.end_of_document = arrays, end_of_document
        self.n, self.seq_len = arrays["targets"].shape
        self.begins = np.zeros((self.n, self.seq_len), dtype=bool)
        self.written: list[Written] = []
        self._entered: list[tuple[int, int, int]] = []
        arrays["weights"].fill(1)

    def put(self, row: int, column: int, stretch: Stretch) -> int:
        """Write the tokens of `stretch` at `column` of `row`; returns the column after them."""
        shard, start, stop = stretch.shard, stretch.start, stretch.stop
        among = shard.documents(start, stop)
        after = column + stop - start
        self.arrays["targets"][row, column:after] = shard.tokens(among, start, stop)
        self.begins[row, shard.begin[among.start + 1 : among.stop] + (column - start)] = True
        self.begins[row, column] = True
        before = shard.before(among, start)
        if before is not None:  # it enters a document in the middle
            self._entered.append((row, column, before))
        self.written.append(Written(row, column, stretch, among))
        return after

    def finish(self, mask_documents: bool) -> bool:
        """Work out the other arrays from the targets and where documents begin.

        Args:
            mask_documents: positions restart with each document, and documents are numbered within their row.

        Returns:
            some row holds more than one document.
        """
        tokens, targets = self.arrays["tokens"], self.arrays["targets"]
        tokens[:, 1:] = targets[:, :-1]
        tokens[self.begins] = self.end_of_document
        for row, column, before in self._entered:
            tokens[row, column] = before
        positions, documents = self.arrays["positions"], self.arrays["documents"]
        columns = np.arange(self.seq_len)
        if not mask_documents:
            positions[:] = columns
            documents.fill(0)
            return False
        np.multiply(self.begins, columns, out=positions)
        np.maximum.accumulate(positions, axis=1, out=positions)
        np.subtract(columns, positions, out=positions)
        np.cumsum(self.begins, axis=1, out=documents)
        documents -= 1
        return bool(self.begins[:, 1:].any())


@dataclass(frozen=True)
class Piece:
    """A part of one document, as it stands in one row."""

    row: int
    column: int
    n_tokens: int
    offset: int
    """Tokens of the document that come before this piece."""
    document: str
    tar: str

    @property
    def begins(self) -> bool:
        return self.offset == 0


def pieces(rows: Rows) -> Iterator[Piece]:
    """What the rows hold, row by row, column by column."""
    for written in sorted(rows.written, key=lambda w: (w.row, w.column)):
        stretch, column = written.stretch, written.column
        shard, among = stretch.shard, written.documents
        lengths = shard.lengths(among, stretch.start, stretch.stop).tolist()
        offset = stretch.start - int(shard.begin[among.start])
        for number, length in zip(shard.order[among].tolist(), lengths, strict=True):
            yield Piece(written.row, column, length, offset, shard.shard.document_id(number), str(shard.shard.tar))
            column, offset = column + length, 0


def check_vocabulary(rows: Rows, vocab_size: int) -> None:
    """Refuse an id that is not in the vocabulary, and say where it is."""
    targets = rows.arrays["targets"]
    if targets.max() < vocab_size:
        return
    row, column = np.argwhere(targets >= vocab_size)[0]
    piece = next(p for p in pieces(rows) if p.row == row and p.column <= column < p.column + p.n_tokens)
    raise DataError(
        f"token id {targets[row, column]} in document {piece.document!r} of {piece.tar} is not below the vocabulary's "
        f"{vocab_size}: the data set does not fit this tokenizer; build it again, or run `megatrain data verify`"
    )
