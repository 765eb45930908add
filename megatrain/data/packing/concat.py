"""Documents laid end to end and cut every `seq_len` tokens: nothing is padded; what is cut goes on in the next row."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatrain.data.corpus import Corpus
from megatrain.data.packing import PACKING
from megatrain.data.rows import Rows
from megatrain.data.slots import Slots


@PACKING.register("concat")
@dataclass(frozen=True, kw_only=True)
class Concat:
    def unsupported_reasons(self, lengths: set[int]) -> list[str]:
        return []

    def build(self, corpora: Sequence[Corpus], slots: Slots, seq_len: int) -> "ConcatPacker":
        return ConcatPacker(corpora, slots)


@dataclass(frozen=True)
class ConcatPacker:
    corpora: Sequence[Corpus]
    slots: Slots

    def fill(self, rows: Rows, row: int, slot: int, source: int) -> None:
        at, tokens = 0, self.slots.tokens
        for stretch in self.corpora[source].read(slot, len(tokens), int(tokens[slot, source]), rows.seq_len):
            at = rows.put(row, at, stretch)

    def advance(self, picked: NDArray[np.int64], seq_len: int) -> NDArray[np.int64]:
        if len(self.corpora) == 1:
            self.slots.tokens += seq_len
        else:
            self.slots.tokens[np.arange(self.slots.n), picked] += seq_len
        return np.full(self.slots.n, seq_len)
