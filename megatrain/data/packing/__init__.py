"""How documents fill rows of a fixed length: a registry of choices.

A packing says how far a slot's place in a source moves with each row it draws, and what is in the row. The first must
be arithmetic that every rank can do for every slot, since each of them saves the places of all.
"""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatrain.base.registry import Registry
from megatrain.data.corpus import Corpus
from megatrain.data.rows import Rows
from megatrain.data.slots import Slots


class Packing(Protocol):
    def fill(self, rows: Rows, row: int, corpus: Corpus, slots: Slots, slot: int, source: int) -> None:
        """Write into `row` what `slot` reads next from its source, `corpus`. Moves nothing."""
        ...

    def advance(self, slots: Slots, picked: NDArray[np.int64], seq_len: int) -> None:
        """Move every slot past the row that it drew from source `picked[slot]`."""
        ...


PACKING: Registry[Any] = Registry("packing", "megatrain.data.packing")
