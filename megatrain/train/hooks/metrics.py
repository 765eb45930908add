"""metrics.jsonl: one line a step, the record of a run that outlives every dashboard."""

import json

from megatrain.train.folder import RunFolder
from megatrain.train.hook import Handle, Hook, Record


class Metrics(Hook):
    """Rank 0 appends a line as soon as a step's numbers are known, and flushes it: a kill loses at most one line."""

    def __init__(self, handle: Handle):
        self.folder = RunFolder(handle.folder)
        self.file = open(self.folder.metrics, "a", encoding="utf-8") if handle.rank == 0 else None  # noqa: SIM115

    def after_step(self, record: Record) -> None:
        if self.file is not None:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()

    def rewound(self, step: int) -> None:
        if self.file is not None:
            self.file.close()
            self.folder.rewind_metrics(step)
            self.file = open(self.folder.metrics, "a", encoding="utf-8")  # noqa: SIM115

    def finish(self, outcome: str) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None
