"""Documents laid end to end and cut every `seq_len` tokens: nothing is padded; what is cut goes on in the next row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatrain.data.corpus import Corpus
from megatrain.data.packing import PACKING
from megatrain.data.rows import Rows
from megatrain.data.slots import Slots
from megatrain.data.text import Place, TextReader


@PACKING.register("concat")
@dataclass(frozen=True, kw_only=True)
class Concat:
    def unsupported_reasons(self, lengths: set[int]) -> list[str]:
        return []

    def build(self, corpora: Sequence[Corpus], slots: Slots, seq_len: int) -> "ConcatPacker":
        texts = {i: TextReader.of(corpus, slots.n) for i, corpus in enumerate(corpora) if corpus.split.is_text}
        return ConcatPacker(corpora, slots, texts)


@dataclass(frozen=True)
class ConcatPacker:
    corpora: Sequence[Corpus]
    slots: Slots
    texts: Mapping[int, TextReader]
    """Readers of the sources that are raw text. In `slots` their `tokens` are bytes, their `rows` tokens."""
    _after: dict[tuple[int, int], Place] = field(default_factory=dict)
    """By (slot, source) of raw text: where the slot stands after what was filled."""

    def fill(self, rows: Rows, row: int, slot: int, source: int) -> None:
        at, tokens = 0, self.slots.tokens
        if source in self.texts:
            place = Place(int(tokens[slot, source]), int(self.slots.rows[slot, source]))
            self._after[slot, source] = self.texts[source].fill(rows, row, slot, place)
            return
        for stretch in self.corpora[source].read(slot, len(tokens), int(tokens[slot, source]), rows.seq_len):
            at = rows.put(row, at, stretch)

    def advance(self, picked: NDArray[np.int64], seq_len: int) -> NDArray[np.int64]:
        if self.texts:
            self._advance_texts(picked, seq_len)
        elif len(self.corpora) == 1:
            self.slots.tokens += seq_len
        else:
            self.slots.tokens[np.arange(self.slots.n), picked] += seq_len
        return np.full(self.slots.n, seq_len)

    def _advance_texts(self, picked: NDArray[np.int64], seq_len: int) -> None:
        """The same with sources of raw text, in which slots that were not filled here stay where they are."""
        for slot, source in enumerate(picked.tolist()):
            if source not in self.texts:
                self.slots.tokens[slot, source] += seq_len
        for (slot, source), place in self._after.items():
            self.slots.tokens[slot, source], self.slots.rows[slot, source] = place
        self._after.clear()
