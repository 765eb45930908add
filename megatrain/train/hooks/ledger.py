"""ledger.jsonl: which documents the weights were trained on, for whoever asks later (`megatrain data seen`)."""

from collections.abc import Callable
from typing import Any

from megatrain.data.ledger import FILE, Head, Ledger
from megatrain.train.hook import Handle, Periodic, Record


class Bookkeeping(Periodic):
    """Rank 0 writes a line for the steps up to each checkpoint, and one at the end: nothing else costs anything.

    Steps that come after the last checkpoint of a run that was killed are in no weights, and in no line.
    """

    def __init__(self, every: int, handle: Handle, order: dict[str, Any], cursors: Callable[[], Any]):
        """Opens the ledger in the run's folder.

        Args:
            order: what decides the batches, from `order_of`.
            cursors: gives where the feed stands after the step that is `due`, or after the last one of all. Every rank
                calls it.
        """
        super().__init__(every, handle)
        self.cursors = cursors
        self.order, self.step = order, handle.first_step - 1
        self.skipped: list[int] = []
        self.ledger = Ledger(handle.folder / FILE) if handle.rank == 0 else None
        self._start()

    def _start(self) -> None:
        cursors = self.cursors()
        if self.ledger is not None:
            self.ledger.start(self.step, cursors, self.order)

    def rewound(self, step: int) -> None:
        self.step, self.skipped = step, []
        self._start()

    @property
    def head(self) -> Head | None:
        """The ledger as it is, for a checkpoint to remember; rank 0 knows."""
        return None if self.ledger is None else self.ledger.head

    def after_step(self, record: Record) -> None:
        self.step = record["step"]
        if record["skipped"]:
            self.skipped.append(self.step)
        if self.due(self.step):
            self._write()

    def finish(self, outcome: str) -> None:
        if outcome != "failed":
            self._write()

    def _write(self) -> None:
        cursors = self.cursors()
        if self.ledger is not None:
            self.ledger.trained(self.step, cursors, self.skipped)
        self.skipped = []
