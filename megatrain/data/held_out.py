"""A pass over held-out documents: finite, the same in every run, every token once."""

from collections.abc import Iterator, Sequence

import numpy as np

from megatrain.data import mixture
from megatrain.data.config import Data
from megatrain.data.corpus import common_tokenizer
from megatrain.data.manifest import HELD_OUT, Manifest
from megatrain.data.rows import Arrays, Rows, check_vocabulary, empty

_NEVER = -(2**62)  # credit that a source without weight cannot earn back
_SEED = 0  # not the run's: runs that are compared must be measured on the same rows


class HeldOut:
    """The held-out splits of the sources, laid end to end and cut in rows; rows of sources alternate by weight."""

    def __init__(self, data: Data, vocab_size: int | None = None, manifests: Sequence[Manifest] | None = None):
        self.data = data
        self.corpora = data.corpora(HELD_OUT, _SEED, manifests)
        self.tokenizer = common_tokenizer(self.corpora)
        self.vocab_size = vocab_size or self.tokenizer.vocab_size

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text that a token stands for: loss per token / (this * ln 2) is bits per byte."""
        splits = [corpus.split for corpus in self.corpora]
        return sum(split.text_bytes for split in splits) / sum(split.tokens for split in splits)

    def plan(self) -> Iterator[tuple[int, int]]:
        """(source, first token) of every row of the pass."""
        weights = [source.weight for source in self.data.sources]
        position = np.zeros(len(weights), dtype=np.int64)
        credit = np.zeros((1, len(weights)), dtype=np.int64)
        sizes = np.array([corpus.size for corpus in self.corpora])
        share = mixture.shares(weights)
        while (left := position < sizes).any():
            picked = mixture.draw(credit, share, self.data.seq_len)
            mixture.settle(credit, share, picked, np.array([self.data.seq_len]))
            source = int(picked[0])
            yield source, int(position[source])
            position[source] += self.data.seq_len
            if position[source] >= sizes[source] and left.sum() > 1:  # the others share what it had
                weights[source] = 0
                share, credit = mixture.shares(weights), np.where(np.array(weights) > 0, credit, _NEVER)

    def batches(self, n_rows: int, n_batches: int | None, rows: range) -> Iterator[tuple[Arrays, int]]:
        """Rows `rows` of each batch of `n_rows`, and whether some row holds more than one document."""
        plan = list(self.plan())
        for first in range(0, len(plan), n_rows)[:n_batches]:
            arrays = empty(len(rows), self.data.seq_len)
            mine = Rows(arrays, self.tokenizer.end_of_document, self.data.on_damage == "skip")
            for i, row in enumerate(rows):
                index = first + row
                self._fill(mine, i, *plan[index if index < len(plan) else -1], counted=index < len(plan))
            most_documents = mine.finish(self.data.mask_documents)
            check_vocabulary(mine, self.vocab_size)
            yield mine.arrays, most_documents

    def _fill(self, rows: Rows, row: int, source: int, start: int, counted: bool) -> None:
        at = 0
        for stretch in self.corpora[source].read(0, 1, start, rows.seq_len):
            at = rows.put(row, at, stretch)
        left = self.corpora[source].size - start if counted else 0
        rows.arrays["weights"][row, max(0, left) :] = 0  # past the end the stream begins again
