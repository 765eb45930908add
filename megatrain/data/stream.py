"""Batch after batch, as arrays: what the feed hands out, worked out in the training process or in a worker."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatrain.base.errors import ConfigError, DataError
from megatrain.base.random import seed_of
from megatrain.data import mixture
from megatrain.data.config import Data
from megatrain.data.corpus import Corpus, common_tokenizer
from megatrain.data.manifest import TRAIN, Manifest
from megatrain.data.rows import Arrays, Rows, check_vocabulary, empty
from megatrain.data.slots import Slots


@dataclass(frozen=True)
class Order:
    """Everything that decides the batches, and which rows of them are wanted."""

    data: Data
    seed: int
    global_batch: int
    dp_rank: int = 0
    dp_size: int = 1
    split: str = TRAIN
    vocab_size: int | None = None
    """Ids at or above it are refused; the tokenizer's own where None."""
    manifests: tuple[Manifest, ...] | None = field(default=None, repr=False)
    """Of the sources, where they were read before: who has one order reads the same data sets."""

    @property
    def n_slots(self) -> int:
        return self.data.n_slots(self.global_batch)

    @property
    def n_rows(self) -> int:
        """Rows of a batch on this rank."""
        return self.global_batch // self.dp_size


class Stream:
    """The rows of one rank, batch after batch, and the places of all slots."""

    def __init__(self, order: Order, cursors: dict[str, Any] | None = None):
        data = order.data
        if problems := data.all_problems(order.global_batch, order.dp_size):
            raise ConfigError(problems)
        self.corpora = data.corpora(order.split, order.seed, order.manifests)
        self.manifests = tuple(corpus.manifest for corpus in self.corpora)
        self.order = order = replace(order, manifests=self.manifests)
        self.tokenizer = common_tokenizer(self.corpora)
        self.vocab_size = order.vocab_size or self.tokenizer.vocab_size
        _check_sizes(self.corpora, order)
        seq_len, weights = data.stage_at(0)
        self._share = mixture.shares(weights)
        self.slots = Slots.first(order.n_slots, self._share, order.seed, seq_len)
        if cursors is not None:
            self.slots.restore(cursors, order.seed, *self._names())
        self.rewriter = data.objective.build(self.corpora[0].special_tokens)
        self.packer = data.packing.build(self.corpora, self.slots, data.seq_len)
        self._sources = [{"path": p, "fingerprint": f} for f, p in zip(*self._names(), strict=True)]
        per_rank = order.n_slots // order.dp_size
        self.own = range(order.dp_rank * per_rank, (order.dp_rank + 1) * per_rank)

    def _names(self) -> tuple[list[str], list[str]]:
        return [corpus.fingerprint for corpus in self.corpora], [corpus.name for corpus in self.corpora]

    def cursors(self) -> dict[str, Any]:
        """Where all slots stand, as JSON values."""
        return self.slots.cursors(self.order.seed, self._sources, self.own if self.is_partial else None)

    @property
    def has_text(self) -> bool:
        """Some source is raw text, so that where a slot stands is known by reading it only."""
        return any(corpus.split.is_text for corpus in self.corpora)

    @property
    def is_partial(self) -> bool:
        """Places of slots of other ranks are not known here."""
        return self.has_text and len(self.own) < self.slots.n

    @property
    def shape(self) -> tuple[int, int]:
        """(rows on this rank, tokens in a row) of the next batch."""
        return self.order.n_rows, self._stage()[0]

    def _stage(self) -> tuple[int, NDArray[np.int64]]:
        """(tokens in a row, shares of the sources) of the next batch."""
        if self.order.data.curriculum:
            seq_len, weights = self.order.data.stage_at(self.slots.drawn)
            return seq_len, mixture.shares(weights)
        return self.order.data.seq_len, self._share

    def skip(self) -> None:
        """Go past a batch without reading it, where that can be done."""
        if self.has_text:
            self.fill(empty(*self.shape))
        else:
            self._draw(None)

    def fill(self, arrays: Arrays) -> tuple[int, Rows]:
        """Write this rank's rows of the next batch into `arrays`, whose shape is `shape`.

        Returns:
            the documents of the row that holds the most, and what was written where.

        Raises:
            DataError: a shard is damaged or holds an id that is not in the vocabulary.
        """
        rows = Rows(arrays, self.tokenizer.end_of_document, self.order.data.on_damage == "skip")
        batch = self.slots.batches
        self._draw(rows)
        self.rewriter.rewrite(rows, lambda row, column: self._seed(batch, row, column))
        most_documents = rows.finish(self.order.data.mask_documents)
        check_vocabulary(rows, self.vocab_size)
        return most_documents, rows

    def _seed(self, batch: int, row: int, column: int) -> int:
        """The seed of what is random at a place of this rank's rows: that of its place in the global batch."""
        return seed_of(self.order.seed, "objective", batch, row + self.order.dp_rank * self.order.n_rows, column)

    def _draw(self, rows: Rows | None) -> None:
        """Every slot draws its rows; those of this rank are filled. A slot's rows stand together in the batch."""
        seq_len, share = self._stage()
        each = self.order.global_batch // self.order.n_slots
        for turn in range(each):
            picked = mixture.draw(self.slots.credit, share, seq_len)
            if rows is not None:
                sources = picked[self.own.start : self.own.stop].tolist()
                for i, (slot, source) in enumerate(zip(self.own, sources, strict=True)):
                    self.packer.fill(rows, i * each + turn, slot, source)
            n_tokens = self.packer.advance(picked, seq_len)
            mixture.settle(self.slots.credit, share, picked, n_tokens)
        self.slots.batches += 1
        self.slots.drawn += self.order.global_batch * seq_len


def _check_sizes(corpora: list[Corpus], order: Order) -> None:
    needed = order.global_batch * order.data.seq_len
    found = sum(
        corpus.size + corpus.split.documents * corpus.split.is_text for corpus in corpora
    )  # a byte or more each
    if found < needed:
        raise DataError(
            f"the {order.split} split has {found} tokens and one batch takes {needed} ({order.global_batch} rows of "
            f"{order.data.seq_len}): give more data, or lower train.global_batch or data.seq_len"
        )
    for corpus in corpora:
        unit, size = ("documents", corpus.split.documents) if corpus.split.is_text else ("tokens", corpus.size)
        if size < order.n_slots:
            raise DataError(
                f"{corpus.name} has {size} {unit} in its {order.split} split, fewer than the {order.n_slots} slots "
                "that share them: leave it out, or lower data.slots"
            )
