"""Documents laid end to end and cut every `seq_len` tokens: nothing is padded; what is cut goes on in the next row."""

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
    def fill(self, rows: Rows, row: int, corpus: Corpus, slots: Slots, slot: int, source: int) -> None:
        at = 0
        for stretch in corpus.read(slot, slots.n, int(slots.tokens[slot, source]), rows.seq_len):
            at = rows.put(row, at, stretch)

    def advance(self, slots: Slots, picked: NDArray[np.int64], seq_len: int) -> None:
        slots.tokens[np.arange(slots.n), picked] += seq_len
