"""Rows being filled: token ids copied out of shards, then everything a `Batch` holds worked out for all rows at once.

A document is stored with its end-of-document token last, and trained on with that token first: the row reads
`E d0 d1 .. dn` and its targets are `d0 d1 .. dn E`. So the targets are the stored stream itself, every token has a
target within its own document, nothing is predicted across documents, and to generate a document is to begin with E.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatrain.base.errors import DataError
from megatrain.data.corpus import Stretch
from megatrain.data.shards import Shard

NAMES = {"tokens": np.int64, "targets": np.int64, "weights": np.float32, "positions": np.int64, "documents": np.int32}
"""The arrays of a `Batch` and their types; all are [rows, seq]."""

Arrays = dict[str, NDArray]
_FEW = 6  # documents a row that are numbered faster one by one than all at once


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


@lru_cache(maxsize=8)
def _count(n: int) -> NDArray[np.int64]:
    """0 .. n-1, not to be written to."""
    return np.arange(n)


def n_bytes(n_rows: int, seq_len: int) -> int:
    return n_rows * seq_len * sum(np.dtype(dtype).itemsize for dtype in NAMES.values())


class Written(NamedTuple):
    """A stretch that was put into a row, kept to say later which documents the row holds."""

    row: int
    column: int
    stretch: Stretch
    first: int
    """Places [first, last) of its documents in the order of the shuffled shard."""
    last: int

    def pieces(self) -> Iterator["Piece"]:
        """The parts of documents in it, in order."""
        row, column, (shard, start, stop), first, last = self
        lengths = shard.lengths(first, last, start, stop).tolist()
        offset = start - int(shard.begin[first])
        for number, length in zip(shard.order[first:last].tolist(), lengths, strict=True):
            yield Piece(row, column, length, offset, shard.shard.document_id(number), shard.shard.name)
            column, offset = column + length, 0


class WrittenIds(NamedTuple):
    """Tokens of one document that were put into a row, from `offset` of the document on."""

    row: int
    column: int
    n_tokens: int
    offset: int
    shard: Shard
    number: int
    """Of the document in its shard."""

    def pieces(self) -> Iterator["Piece"]:
        yield Piece(*self[:4], self.shard.document_id(self.number), self.shard.name)


class Rows:
    """The rows of one batch while they are filled, one after the other.

    rows = Rows(arrays, end_of_document)
    column = rows.put(row, 0, stretch)     # for each stretch of each row
    most_documents = rows.finish(mask_documents)
    """

    def __init__(self, arrays: Arrays, end_of_document: int, skip_damaged: bool = False):
        self.arrays, self.end_of_document, self.skip_damaged = arrays, end_of_document, skip_damaged
        self.n, self.seq_len = arrays["targets"].shape
        self.written: list[Written | WrittenIds] = []
        self.skipped: list[Piece] = []
        """What was left out of the loss, since its document is damaged."""
        self._begins: list[int] = []  # elements, counted through all rows, where a document begins within a row
        self._entered: dict[int, int] = {}  # elements where one is entered in the middle, and the id before
        self._targets = arrays["targets"].reshape(-1)
        arrays["weights"].fill(1)

    def put(self, row: int, column: int, stretch: Stretch) -> int:
        """Write the tokens of `stretch` at `column` of `row`; returns the column after them."""
        shard, start, stop = stretch
        element, n = row * self.seq_len + column, stop - start
        entered = shard.enter(start, stop)
        if column:
            self._begins.append(element)
        if stop <= entered.end and entered.sound:  # all of it within one document, as most rows of long ones are
            ids, at = shard.shard.ids, start + entered.shift
            self._targets[element : element + n] = ids[at : at + n]
            if entered.begin != start:
                self._entered[element] = int(ids[at - 1])
            self.written.append(Written(row, column, stretch, entered.place, entered.place + 1))
        else:
            self._put_several(row, column, stretch, entered.place)
        return column + n

    def _put_several(self, row: int, column: int, stretch: Stretch, first: int) -> None:
        """What `put` does for a stretch of several documents, the `first` of which is known, or of a damaged one."""
        shard, start, stop = stretch
        last, ends = shard.ends(first, stop)
        written = Written(row, column, stretch, first, last)
        self.written.append(written)
        element = row * self.seq_len + column
        self._begins += [end + (element - start) for end in ends[:-1]]  # where one ends the next begins
        damaged = shard.damaged(first, last)
        if ends[-1] > stop:
            shard.go_on(last - 1, stop)
        if damaged is not None:
            self._put_damaged(written, damaged)
        else:
            shard.copy(self._targets[element : element + stop - start], first, ends, start, stop)
            if shard.begin[first] != start:
                self._entered[element] = shard.before(first, start)

    def put_ids(
        self, row: int, column: int, ids: NDArray[Any], offset: int, n_tokens: int, shard: Shard, number: int
    ) -> None:
        """Write `n_tokens` of a document's `ids`, from `offset` on, at `column` of `row`."""
        element = row * self.seq_len + column
        self._targets[element : element + n_tokens] = ids[offset : offset + n_tokens]
        if column:
            self._begins.append(element)
        if offset:
            self._entered[element] = int(ids[offset - 1])
        self.written.append(WrittenIds(row, column, n_tokens, offset, shard, number))

    def leave_out(self, shard: Shard, number: int) -> None:
        """Pass over a damaged document whose length in tokens nobody knows, or refuse it."""
        piece = Piece(0, 0, 0, 0, shard.document_id(number), shard.name)
        self._refuse(piece, shard)
        self.skipped.append(piece)

    def _refuse(self, piece: "Piece", shard: Shard) -> None:
        """Damaged documents are not read, unless they are to be left out."""
        if self.skip_damaged:
            return
        why = shard.unreadable.partition(": ")[0] or "its bytes do not have the checksum of the index"
        raise DataError(
            f"document {piece.document!r} of {piece.tar} is damaged ({why}): copy the shard again (`megatrain data "
            "verify` names all that are bad), or leave such documents out with data.on_damage: skip"
        )

    def _put_damaged(self, written: Written, damaged: list[bool]) -> None:
        """Leave damaged documents out of the loss; in their place stand end-of-document tokens.

        So every position stays what it was: all ranks go on alike without telling each other, and a resume skips the
        same.
        """
        for piece, bad in zip(written.pieces(), damaged, strict=True):
            if bad:
                self._refuse(piece, written.stretch.shard.shard)
            shard, start, _ = written.stretch
            element = piece.row * self.seq_len + piece.column
            at = start + piece.column - written.column
            into = slice(element, element + piece.n_tokens)
            if bad:
                self._targets[into] = self.end_of_document
                self.arrays["weights"].reshape(-1)[into] = 0
                self.skipped.append(piece)
            else:
                place = int(shard.end.searchsorted(at, side="right"))
                shard.copy(self._targets[into], place, [at + piece.n_tokens], at, at + piece.n_tokens)
                if not piece.begins:
                    self._entered[element] = shard.before(place, at)

    def pad(self, row: int, column: int) -> None:
        """Fill the rest of a row with tokens that do not count and that no document sees."""
        if column == self.seq_len:
            return
        into = slice(row * self.seq_len + column, (row + 1) * self.seq_len)
        if column:
            self._begins.append(into.start)
        self._targets[into] = self.end_of_document
        self.arrays["weights"].reshape(-1)[into] = 0

    def body(self, piece: "Piece") -> NDArray[np.int64]:
        """A copy of a piece's targets without its end-of-document token; empty where it is damaged."""
        element = piece.row * self.seq_len + piece.column
        found = self._targets[element : element + piece.n_tokens].copy()
        if piece in self.skipped:
            return found[:0]
        return found[:-1] if found[-1] == self.end_of_document else found

    def rewrite(self, piece: "Piece", targets: NDArray[np.int64], weights: NDArray[np.float32] | None = None) -> None:
        """Put `targets` in place of the piece's `body`, which is as long, and read it like a document of its own."""
        element = piece.row * self.seq_len + piece.column
        into = slice(element, element + len(targets))
        self._targets[into] = targets
        if weights is not None:
            self.arrays["weights"].reshape(-1)[into] = weights
        self._entered.pop(element, None)

    def finish(self, mask_documents: bool) -> int:
        """Work out the other arrays from the targets and where documents begin.

        Args:
            mask_documents: positions restart with each document, and documents are numbered within their row.

        Returns:
            the documents of the row that holds the most; 1 where they are not told apart.
        """
        tokens = self.arrays["tokens"].reshape(-1)
        begins = sorted(self._begins)  # rows may have been filled in any order
        tokens[1:] = self._targets[:-1]
        tokens[:: self.seq_len] = self.end_of_document
        tokens[begins] = self.end_of_document
        for element, before in self._entered.items():
            tokens[element] = before
        self.arrays["positions"][:] = _count(self.seq_len)
        self.arrays["documents"].fill(0)
        if not mask_documents or not begins:
            return 1
        if len(begins) > _FEW * self.n:
            self._number_all(np.array(begins))
        else:
            self._number_few(begins)
        return int(self.arrays["documents"][:, -1].max()) + 1

    def _number_few(self, begins: list[int]) -> None:
        """Positions and numbers of the documents that begin within rows, row for row from there to the row's end."""
        positions, documents = self.arrays["positions"].reshape(-1), self.arrays["documents"].reshape(-1)
        count = _count(self.seq_len)
        for begin in begins:
            end = begin - begin % self.seq_len + self.seq_len
            positions[begin:end] = count[: end - begin]
            documents[begin:end] += 1

    def _number_all(self, begins: NDArray[np.int64]) -> None:
        """The same for many at once."""
        starts = np.arange(0, self._targets.size, self.seq_len)
        begins = np.sort(np.concatenate([starts, begins]))
        row = begins // self.seq_len
        number = np.arange(len(begins)) - row.searchsorted(row)  # how many begin before it in its row
        lengths = np.empty_like(begins)
        np.subtract(begins[1:], begins[:-1], out=lengths[:-1])
        lengths[-1] = self._targets.size - begins[-1]
        positions = self.arrays["positions"].reshape(-1)
        np.subtract(_count(self._targets.size), np.repeat(begins, lengths), out=positions)
        self.arrays["documents"].reshape(-1)[:] = np.repeat(number.astype(np.int32), lengths)


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
        yield from written.pieces()


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
