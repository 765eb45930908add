"""The `checkpoint` section of a run file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from megatrain.data.store import OBJECT_STORES, redacted
from megatrain.data.store import problems as address_problems

LEAST_KEPT = 2
"""Newest commits that always stay, so that a damaged one leaves another."""


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Which commits stay when a new one is made."""

    last: int = 3
    """The newest n. At least 2, so that a damaged one leaves another."""
    every: int | None = None
    """Also every commit whose step is a multiple of this."""
    best: int = 0
    """Also the n with the lowest held-out loss, of those that were saved at a step with an evaluation."""

    def problems(self) -> list[str]:
        found = []
        if self.last < LEAST_KEPT:
            found.append(f"last={self.last}: at least {LEAST_KEPT} stay, so that a damaged one leaves another")
        if self.every is not None and self.every < 1:
            found.append(f"every={self.every}: it must be at least 1 step, or left out")
        if self.best < 0:
            found.append(f"best={self.best}: it counts commits, so 0 or more")
        return found

    def superfluous(self, scores: Mapping[int, float | None]) -> list[int]:
        """The committed steps that may go, oldest first.

        Args:
            scores: held-out loss of each committed step; None where it was not measured. The earlier of two equals
                stays.
        """
        newest = sorted(scores)[-self.last :]
        measured = sorted((score, step) for step, score in scores.items() if score is not None)
        best = [step for _, step in measured[: self.best]]
        every = [step for step in scores if self.every and step % self.every == 0]
        return sorted(set(scores).difference(newest, best, every))


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When state is saved, what is kept and what a new start takes up."""

    every: int | None = None
    """Steps between saves; without it only the end of the run is saved (and a preemption)."""
    dir: str | None = None
    """A folder or a URL (s3://bucket/runs) under which this run's commits lie, as DIR/NAME/step-...; in the run's own
    folder by default."""
    keep: Keep = field(default_factory=Keep)
    async_: bool = True
    """Write while training goes on; the step waits only for the copy to host memory."""
    resume: Literal["auto", "must", "never"] = "auto"
    """auto: resume where there are commits, else start; must: never start anew; never: refuse a folder with commits."""
    fallback: bool = False
    """Take the commit before when the newest one is damaged. Half-written ones are never taken, whatever this says."""
    failed_save: Literal["stop", "go_on"] = "stop"
    """What a save that fails (a full disk) does to the run; `go_on` warns and tries again at the next save. The last
    state must be saved: the run fails if it cannot be."""
    init_from: str | None = None
    """A checkpoint whose weights the run starts from; optimiser, schedule and data start anew."""
    acknowledge: tuple[str, ...] = ()
    """Keys that are meant to differ from those of the commit that is resumed, though they change the mathematics."""

    def problems(self) -> list[str]:
        found = []
        if self.every is not None and self.every < 1:
            found.append(f"every={self.every}: it must be at least 1 step, or left out")
        if self.dir is not None:
            found += [f"dir: {problem}" for problem in self._dir_problems(self.dir)]
        if self.init_from is not None and self.resume == "must":
            found.append("init_from starts a new run and resume=must refuses one: leave one of them out")
        return found

    @staticmethod
    def _dir_problems(place: str) -> list[str]:
        if place.startswith(("http://", "https://")):
            return [f"{redacted(place)} cannot be written to: name a folder, or {', '.join(OBJECT_STORES)}"]
        return address_problems(place, allow_pipe=False)
