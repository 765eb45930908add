"""The feed: this rank's rows of each global batch, read ahead by worker processes.

Global batch k depends on the data config, the seed and k alone: not on the number of ranks or workers, on how far they
read ahead or on where the run was stopped. Each batch carries the places of all slots after it, so what was read ahead
and not trained on is not lost.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch

from megatrain.base.log import warn
from megatrain.data.config import Data
from megatrain.data.held_out import HeldOut
from megatrain.data.manifest import TRAIN, Manifest, TokenizerEntry
from megatrain.data.read_ahead import makers
from megatrain.data.rows import Arrays, Piece
from megatrain.data.stream import Order, Stream
from megatrain.nn.batch import Batch


class Feed(Iterator[Batch]):
    """An endless iterator of `Batch`; every rank of a data-parallel group sees its own rows of the same order.

    with Feed.open(data, seed=0, global_batch=32, dp_rank=1, dp_size=4, cursors=saved) as feed:
        batch = next(feed)      # 8 rows
        save(batch.cursors)     # the same on every rank: places of all slots after this batch

    Where a source is raw text, a rank knows the places of its own slots only: `slots.merged` puts those of all ranks
    together.
    """

    def __init__(self, order: Order, cursors: dict[str, Any] | None = None, pin_memory: bool = False):
        self.pin_memory = pin_memory
        self.skipped: dict[tuple[str, str], int] = {}
        """Tokens left out so far on this rank, by (tar, document), since the document is damaged (data.on_damage)."""
        self._stream = Stream(order, cursors)  # opened even beside workers, since it refuses what is wrong at once
        self.order = self._stream.order  # with the manifests, which workers need not read again
        self._start(cursors)

    @classmethod
    def open(
        cls,
        data: Data,
        *,
        seed: int,
        global_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        cursors: dict[str, Any] | None = None,
        split: str = TRAIN,
        vocab_size: int | None = None,
        pin_memory: bool = False,
        manifests: tuple[Manifest, ...] | None = None,
    ) -> Self:
        """The feed of one rank.

        Args:
            global_batch: rows over all ranks; a multiple of the slots.
            cursors: `batch.cursors` of the last batch trained on, from any number of ranks and workers.
            vocab_size: ids at or above it are refused; the tokenizer's own size where not given.
            pin_memory: batches are in page-locked memory, so that their copy to a GPU can overlap computation.
            manifests: of the sources, where they were read before.

        Raises:
            ConfigError: values that do not go together.
            DataError: a data set is missing, damaged, too small, or not the one of the cursors.
        """
        order = Order(data, seed, global_batch, dp_rank, dp_size, split, vocab_size, manifests)
        return cls(order, cursors, pin_memory)

    @property
    def tokenizer(self) -> TokenizerEntry:
        """The tokenizer that all sources share."""
        return self._stream.tokenizer

    @property
    def batches(self) -> int:
        """Global batches handed out since the beginning of the data, before a resume too."""
        return self._delivered

    @property
    def worker_pids(self) -> list[int]:
        return [worker.process.pid for worker in self._makers.workers]

    def seek(self, cursors: dict[str, Any] | None) -> None:
        """Go on after the batch that carried `cursors`, or from the very beginning. Costs the same everywhere."""
        self.close()
        self._stream = Stream(self.order, cursors)
        self._start(cursors)

    def _start(self, cursors: dict[str, Any] | None) -> None:
        self._delivered = self._stream.slots.batches
        self._makers = makers(self._stream, cursors)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        ready = self._makers.next()
        self._note(ready.skipped)
        tensors = tensors_of(ready.arrays, self.pin_memory, ready.borrowed)
        first_row = self.order.dp_rank * self.order.n_rows
        batch = Batch(
            **tensors,
            most_documents=ready.most_documents,
            cursors=ready.cursors,
            step=self._delivered,
            first_row=first_row,
        )
        self._delivered += 1
        return batch

    def _note(self, skipped: Sequence[Piece]) -> None:
        for piece in skipped:
            named = piece.tar, piece.document
            if named not in self.skipped:
                warn("document %r of %s is damaged and left out of the loss", piece.document, piece.tar)
            self.skipped[named] = self.skipped.get(named, 0) + piece.n_tokens

    def close(self) -> None:
        """End the workers."""
        for worker in self._makers.workers:
            worker.close()
        self._makers.workers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def held_out(
    data: Data,
    *,
    global_batch: int,
    n_batches: int | None = None,
    dp_rank: int = 0,
    dp_size: int = 1,
    vocab_size: int | None = None,
    pin_memory: bool = False,
    manifests: Sequence[Manifest] | None = None,
) -> Iterator[Batch]:
    """This rank's rows of a pass over the held-out splits: the same rows in every run, whatever its seed.

    Each token is met once. Every rank gets the same number of batches: what is missing of the last one has weight 0.

    Args:
        global_batch: rows over all ranks.
        n_batches: stop after so many; the whole splits where not given.
        manifests: of the sources, where they were read before.
    """
    source = HeldOut(data, vocab_size, manifests)
    rows = range(dp_rank * global_batch // dp_size, (dp_rank + 1) * global_batch // dp_size)
    for arrays, most_documents in source.batches(global_batch, n_batches, rows):
        yield Batch(**tensors_of(arrays, pin_memory), most_documents=most_documents)


def tensors_of(arrays: Arrays, pin_memory: bool, copy: bool = False) -> dict[str, Any]:
    """The tensors of a `Batch`, copied where the arrays will be overwritten or must go to page-locked memory."""
    tensors = {}
    for name, array in arrays.items():
        tensor = torch.from_numpy(array)
        if pin_memory:
            tensor = torch.empty_like(tensor, pin_memory=True).copy_(tensor)
        elif copy:
            tensor = tensor.clone()
        tensors[name] = tensor
    return tensors
