"""Documents kept whole: each goes into the row where it leaves the least room, within closed windows.

A slot's part of an epoch is cut into windows of `window * seq_len` tokens. The documents that begin in a window are
packed into rows of their own, so what a row holds depends on the lengths of its window's documents alone: a place in
the data is the beginning of a window and a row in it. Only documents longer than a row are cut. What is left of a row
is padding with weight 0.

Paper: Ding et al. 2024, arXiv:2404.10830 (best-fit packing). Differs in that it packs windows, not the whole corpus, so
that resuming reads the lengths of one window.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatrain.base.errors import ConfigError, DataError
from megatrain.data.corpus import Corpus, Stretch
from megatrain.data.packing import PACKING
from megatrain.data.rows import Rows
from megatrain.data.slots import Slots

_EPOCHS_WITHOUT_A_ROW = 100


@PACKING.register("best_fit")
@dataclass(frozen=True, kw_only=True)
class BestFit:
    window: int = 64
    """Rows' worth of documents that are packed together: more leave less padding and cost more time on a resume."""

    def problems(self) -> list[str]:
        return [] if self.window >= 1 else [f"data.packing.window is {self.window}: it must be at least 1"]

    def unsupported_reasons(self, lengths: set[int]) -> list[str]:
        if len(lengths) == 1:
            return []
        return [
            f"data.packing best_fit packs windows of documents into rows of one length, and data.curriculum has rows "
            f"of {sorted(lengths)} tokens: use concat, or change the weights only"
        ]

    def build(self, corpora: Sequence[Corpus], slots: Slots, seq_len: int) -> "BestFitPacker":
        if texts := [corpus.name for corpus in corpora if corpus.split.is_text]:
            raise ConfigError(
                [
                    f"data.packing best_fit needs the lengths of documents in tokens, and {', '.join(texts)} is raw "
                    "text, tokenised as it is read: use concat, or make token shards of it with `megatrain data build`"
                ]
            )
        return BestFitPacker(corpora, slots, seq_len, self.window * seq_len)


@dataclass
class BestFitPacker:
    corpora: Sequence[Corpus]
    slots: Slots
    seq_len: int
    window_tokens: int
    _windows: dict[tuple[int, int], tuple[int, list[list[Stretch]]]] = field(default_factory=dict)
    """By (slot, source): where its window begins, and the rows of it."""

    def fill(self, rows: Rows, row: int, slot: int, source: int) -> None:
        at = 0
        for stretch in self._window(slot, source)[self.slots.rows[slot, source]]:
            at = rows.put(row, at, stretch)
        rows.pad(row, at)

    def advance(self, picked: NDArray[np.int64], seq_len: int) -> NDArray[np.int64]:
        found = np.empty(self.slots.n, dtype=np.int64)
        for slot, source in enumerate(picked.tolist()):
            rows = self._window(slot, source)
            row = int(self.slots.rows[slot, source])
            found[slot] = sum(stretch.stop - stretch.start for stretch in rows[row])
            if row + 1 < len(rows):
                self.slots.rows[slot, source] = row + 1
            else:
                self.slots.tokens[slot, source] = self._end(slot, source, int(self.slots.tokens[slot, source]))
                self.slots.rows[slot, source] = 0
        return found

    def _end(self, slot: int, source: int, start: int) -> int:
        """Where the window that begins at `start` ends: a window does not go over the end of an epoch."""
        low, high = self.corpora[source].part(slot, self.slots.n)
        return min(start + self.window_tokens, start - start % (high - low) + high - low)

    def _window(self, slot: int, source: int) -> list[list[Stretch]]:
        """The rows of the slot's window; a window in which no document begins is passed over."""
        known = self._windows.get((slot, source))
        start = int(self.slots.tokens[slot, source])
        if known is not None and known[0] == start:
            return known[1]
        corpus, first = self.corpora[source], start
        low, high = corpus.part(slot, self.slots.n)
        while True:
            epoch, offset = divmod(start, high - low)
            end = self._end(slot, source, start)
            rows = best_fit(_documents(corpus, epoch, low + offset, low + offset + end - start), self.seq_len)
            if rows:
                break
            start = end
            if start - first > _EPOCHS_WITHOUT_A_ROW * (high - low):
                raise DataError(f"no document of {corpus.name} begins in the part of slot {slot}: lower data.slots")
        self.slots.tokens[slot, source] = start
        self._windows[slot, source] = start, rows
        return rows


def _documents(corpus: Corpus, epoch: int, start: int, stop: int) -> list[Stretch]:
    """The documents that begin in [start, stop) of an epoch, whole."""
    found = []
    for shard, first, last in corpus.stretches(epoch, start, stop):
        inside = slice(int(shard.begin.searchsorted(first)), int(shard.begin.searchsorted(last)))
        begins, ends = shard.begin[inside].tolist(), shard.end[inside].tolist()
        found += [Stretch(shard, begin, end) for begin, end in zip(begins, ends, strict=True)]
    return found


def best_fit(documents: list[Stretch], seq_len: int) -> list[list[Stretch]]:
    """Documents packed into rows of at most `seq_len` tokens: the longest first, each where it leaves the least room.

    Pieces of `seq_len` tokens of longer documents fill rows of their own, ahead of the rest; the piece that remains is
    packed like a document.
    """
    rows: list[list[Stretch]] = []
    pieces = []
    for shard, start, stop in documents:
        while stop - start >= seq_len:
            rows.append([Stretch(shard, start, start + seq_len)])
            start += seq_len
        if start < stop:
            pieces.append(Stretch(shard, start, stop))
    pieces.sort(key=lambda piece: piece.start - piece.stop)  # stable: equal lengths keep their order
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for piece in pieces:
        length = piece.stop - piece.start
        place = bisect_left(room, (length, -1))
        if place == len(room):
            left, row = seq_len, len(rows)
            rows.append([])
        else:
            left, row = room.pop(place)
        rows[row].append(piece)
        if left > length:
            insort(room, (left - length, row))
    return rows
