"""A trace of some steps: what the processor and the card did when, for chrome://tracing or perfetto.dev.

On a card also a snapshot of its memory, each piece with the line that asked for it, for pytorch.org/memory_viz.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatrain.base.device import MemoryHistory
from megatrain.base.log import log
from megatrain.train.hook import Handle, Hook, Record
from megatrain.train.hooks import HOOK


@HOOK.register("profile")
@dataclass(frozen=True, kw_only=True)
class Profile:
    after: int = 10
    """The last step before those that are traced: the first ones compile and allocate, and tell of nothing else."""
    steps: int = 3
    """How many are traced. A trace of a step of a large model takes tens of megabytes."""

    def problems(self) -> list[str]:
        found = [] if self.after >= 1 else [f"after={self.after}: tracing begins when a step has ended, so 1 or more"]
        return found + ([] if self.steps >= 1 else [f"steps={self.steps}: at least 1 step is traced"])

    def build(self, handle: Handle) -> Hook:
        return _Profile(self, handle)


class _Profile(Hook):
    """Every rank traces itself; the files are `profile/trace-rank0.json.gz` and so on in the run's folder."""

    def __init__(self, choice: Profile, handle: Handle):
        self.first, self.last = choice.after, choice.after + choice.steps
        self.handle = handle
        self._profiler: Any = None
        self._memory = MemoryHistory()

    def due(self, step: int) -> bool:
        return step in (self.first, self.last) or (step == self.handle.total_steps and self._profiler is not None)

    def after_step(self, record: Record) -> None:
        step = record["step"]
        if step == self.first:
            self._start()
        elif self._profiler is not None and step in (self.last, self.handle.total_steps):
            self._write()

    def finish(self, outcome: str) -> None:
        if self._profiler is not None:  # the run ended while it was traced: what there is, is written
            self._write()

    def _start(self) -> None:
        from torch.profiler import profile  # slow to import

        self._memory.start()
        self._profiler = profile(record_shapes=True)
        self._profiler.start()

    def _write(self) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        folder: Path = self.handle.folder / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        rank = self.handle.rank
        trace = folder / f"trace-rank{rank}.json.gz"
        profiler.export_chrome_trace(str(trace))
        self._memory.write(folder / f"memory-rank{rank}.pickle")
        self.handle.note("profiled", trace=str(trace))
        log("steps %d to %d are traced in %s", self.first + 1, self.last, folder)
