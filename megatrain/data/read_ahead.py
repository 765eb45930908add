"""Where a feed's batches are made: in its own process, by workers that take turns, or by workers side by side.

Token shards say where every slot stands without being read, so each worker makes whole batches and goes past those of
the others. Raw text must be read to know: there each worker has slots of its own and makes its rows of every batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from megatrain.data.rows import Arrays, Piece, empty
from megatrain.data.slots import merged
from megatrain.data.stream import Order, Stream
from megatrain.data.worker import Task, Worker


@dataclass(frozen=True)
class Ready:
    """A batch that was made."""

    arrays: Arrays
    most_documents: int
    cursors: dict[str, Any]
    skipped: Sequence[Piece]
    borrowed: bool
    """The arrays are overwritten when the next batch is asked for."""


class Makers(Protocol):
    workers: list[Worker]

    def next(self) -> Ready: ...


class Here:
    """The feed's own process reads."""

    def __init__(self, stream: Stream):
        self.stream = stream
        self.workers: list[Worker] = []

    def next(self) -> Ready:
        arrays = empty(*self.stream.shape)
        most_documents, rows = self.stream.fill(arrays)
        return Ready(arrays, most_documents, self.stream.cursors(), rows.skipped, borrowed=False)


class InTurn:
    """Each worker makes whole batches."""

    def __init__(self, order: Order, cursors: dict[str, Any] | None, n_workers: int):
        self.workers = [Worker(Task(order, cursors, i, n_workers)) for i in range(n_workers)]
        self._turn = 0

    def next(self) -> Ready:
        arrays, filled = self.workers[self._turn % len(self.workers)].next()
        self._turn += 1
        return Ready(arrays, filled.most_documents, filled.cursors, filled.skipped, borrowed=True)


class SideBySide:
    """Each worker makes some rows of every batch, as data-parallel ranks of a finer division do."""

    def __init__(self, order: Order, cursors: dict[str, Any] | None, n_workers: int):
        slots = order.n_slots // order.dp_size
        n = max(n for n in range(1, n_workers + 1) if slots % n == 0)
        parts = (replace(order, dp_rank=order.dp_rank * n + i, dp_size=order.dp_size * n) for i in range(n))
        self.workers = [Worker(Task(part, cursors, 0, 1)) for part in parts]

    def next(self) -> Ready:
        found = [worker.next() for worker in self.workers]
        if len(found) == 1:
            arrays, filled = found[0]
            return Ready(arrays, filled.most_documents, filled.cursors, filled.skipped, borrowed=True)
        arrays = {name: np.concatenate([part[name] for part, _ in found]) for name in found[0][0]}
        said = [filled for _, filled in found]
        skipped = [piece for filled in said for piece in filled.skipped]
        return Ready(
            arrays, max(f.most_documents for f in said), merged([f.cursors for f in said]), skipped, borrowed=False
        )


def makers(stream: Stream, cursors: dict[str, Any] | None) -> Makers:
    """Those that `data.workers` asks for, from `cursors` on; `stream` is opened there."""
    order, n = stream.order, stream.order.data.workers
    if n == 0:
        return Here(stream)
    return SideBySide(order, cursors, n) if stream.has_text else InTurn(order, cursors, n)
