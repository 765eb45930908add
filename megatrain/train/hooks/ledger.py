"""ledger.jsonl: which documents the weights were trained on, for whoever asks later (`megatrain data seen`)."""

from collections.abc import Callable
from typing import Any

from megatrain.config.build import plain
from megatrain.data.config import Data
from megatrain.data.ledger import FILE, Ledger, order_of
from megatrain.data.manifest import TRAIN
from megatrain.train.hook import Handle, Periodic, Record


class Bookkeeping(Periodic):
    """Rank 0 writes a line for the steps up to each checkpoint, and one at the end: nothing else costs anything.

    Steps that come after the last checkpoint of a run that was killed are in no weights, and in no line.
    """

    def __init__(
        self, every: int, handle: Handle, data: Data, seed: int, global_batch: int, cursors: Callable[[], Any]
    ):
        """`cursors` gives where the feed stands after the step that is `due`, or after the last one of all."""
        super().__init__(every, handle)
        self.cursors = cursors
        self.step = handle.first_step - 1
        self.skipped: list[int] = []
        self.ledger: Ledger | None = None
        if handle.rank == 0:
            fingerprints = [corpus.fingerprint for corpus in data.corpora(TRAIN, seed)]
            self.ledger = Ledger(handle.folder / FILE)
            self.ledger.start(self.step, cursors(), order_of(plain(data), seed, global_batch, fingerprints))

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
        if self.ledger is not None:
            self.ledger.trained(self.step, self.cursors(), self.skipped)
        self.skipped = []
