"""How documents fill rows of a fixed length: a registry of choices.

A packing says how far a slot's place in a source moves with each row it draws, and what is in the row. The first must
be arithmetic on lengths that every rank can do for every slot, since each of them saves the places of all.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatrain.base.registry import Registry
from megatrain.data.corpus import Corpus
from megatrain.data.rows import Rows
from megatrain.data.slots import Slots


class Packer(Protocol):
    """Fills the rows of some slots and keeps the places of all."""

    def fill(self, rows: Rows, row: int, slot: int, source: int) -> None:
        """Write into `row` what `slot` reads next from `source`. Moves nothing."""
        ...

    def advance(self, picked: NDArray[np.int64], seq_len: int) -> NDArray[np.int64]:
        """Move every slot past the row that it drew from source `picked[slot]`.

        Returns:
            int64 [slots], the tokens of each of those rows that count.
        """
        ...


class Packing(Protocol):
    def unsupported_reasons(self, lengths: set[int]) -> list[str]:
        """Why rows of these lengths, which follow one another in a run, cannot be packed; empty where they can."""
        ...

    def build(self, corpora: Sequence[Corpus], slots: Slots, seq_len: int) -> Packer:
        """A packer of rows of up to `seq_len` tokens, which moves the places in `slots`."""
        ...


PACKING: Registry[Any] = Registry("packing", "megatrain.data.packing")
