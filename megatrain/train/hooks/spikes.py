"""Loss spikes: which documents were in the batch, where gradients and activations were large, and what to do about it.

A spike is a loss far above those before it, measured by their median and the median of their distances from it, which
earlier spikes do not move. The loss of the step right before is not among them: it is still on its way from the device
when a step begins, and so the decision does not depend on what else a run waits for.

| action | |
|---|---|
| log | an event with documents, gradient norms and activations |
| skip | and the step is not taken: its gradient, known by then, is dropped before weights and moments change |
| rewind | and weights and moments go back to the newest checkpoint and train on with the data that comes next, so |
| | that what led to the spike is left out (Chowdhery et al. 2022, arXiv:2204.02311, section 5.1); the newest |
| | is also one that a stop has made, so a run that was stopped may go back less far; a stop at the very spike |
| | goes back and saves nothing, so the resumed run sees that data again |
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from megatrain.base.log import warn
from megatrain.train.hook import Handle, Hook, Record
from megatrain.train.hooks import HOOK

NORMAL = 1.4826
"""The standard deviation of a normal distribution in medians of distances from the median."""
DONE = {
    "log": "see events.jsonl",
    "skip": "the step was not taken",
    "rewind": "going back to the newest checkpoint",
}
LEAST_SPREAD = 1e-3
"""Of the median: so that losses which hardly move do not make a spike of nothing."""


@HOOK.register("spikes")
@dataclass(frozen=True, kw_only=True)
class Spikes:
    threshold: float = 6.0
    """Robust standard deviations above the median from which a loss is a spike."""
    window: int = 64
    """Steps whose losses it is compared with: few, so that the fall of the loss over them is not taken for noise."""
    after: int = 32
    """Steps before the first comparison."""
    action: Literal["log", "skip", "rewind"] = "log"
    most_rewinds: int = 3
    """How often to go back in one run; later spikes are logged only."""

    def problems(self) -> list[str]:
        found = [] if self.threshold > 0 else [f"threshold={self.threshold} must be above 0"]
        if not 2 <= self.after <= self.window:
            found.append(f"after={self.after} must be from 2 to window={self.window}")
        if self.most_rewinds < 0:
            found.append(f"most_rewinds={self.most_rewinds} must be at least 0")
        return found

    def build(self, handle: Handle) -> Hook:
        return _Spikes(self, handle)


class _Spikes(Hook):
    """Writes an event `spike`. The loss is the same on every rank, so all of them decide and examine alike."""

    def __init__(self, choice: Spikes, handle: Handle):
        self.choice, self.handle, self.rewinds = choice, handle, 0
        self.step = handle.first_step - 1
        self.asked: int | None = None
        """The step at whose spike it asked to go back: the one after it has run by then, and goes with it."""
        self.losses: deque[float] = deque(maxlen=choice.window + 1)

    def after_step(self, record: Record) -> None:
        step, loss = record["step"], record["loss"]
        before = self._compared(list(self.losses)[:-1])
        score = robust_score(loss, before) if len(before) >= self.choice.after else 0.0
        if score > self.choice.threshold:
            self._act(record, score)
        self.losses.append(loss)
        self.step = step
        self._limit(step + 2, list(self.losses))

    def _act(self, record: Record, score: float) -> None:
        step, loss, action = record["step"], record["loss"], self.choice.action
        if (action == "skip" and not record["skipped"]) or (self.asked is not None and step == self.asked + 1):
            action = "log"
        if action == "rewind" and self.rewinds >= self.choice.most_rewinds:
            warn("spike at step %d: it went back %d times already, and does not again", step, self.rewinds)
            action = "log"
        warn("loss %.3f at step %d is a spike (%.1f robust deviations): %s", loss, step, score, DONE[action])
        facts = {"loss": loss, "grad_norm": record["grad_norm"], "score": min(round(score, 2), 1e9), "action": action}
        self.handle.note("spike", at_step=step, **facts, **self.handle.examine())
        if action == "rewind":
            self.asked = step
            self.handle.rewind()

    def rewound(self, step: int) -> None:
        self.rewinds += self.asked is not None
        self.asked = None

    def _limit(self, step: int, losses: list[float]) -> None:
        """Say from which loss on `step` is not to be taken, if it is not."""
        before = self._compared(losses)
        if self.choice.action == "skip" and len(before) >= self.choice.after:
            self.handle.limit_loss(step, limit(before, self.choice.threshold))

    def _compared(self, losses: list[float]) -> list[float]:
        """Those of the last `window` that are numbers."""
        return [x for x in losses[-self.choice.window :] if math.isfinite(x)]

    # --------------------------------------------------------------------------------- resumes

    def state(self) -> dict[str, Any]:
        losses = [x if math.isfinite(x) else None for x in self.losses]
        return {"losses": losses, "step": self.step, "rewinds": self.rewinds}

    def restore(self, state: Any) -> None:
        self.losses.clear()
        self.losses.extend(math.nan if x is None else x for x in state["losses"])
        self.rewinds = max(self.rewinds, state["rewinds"])  # going back does not make it forget that it did
        losses = list(self.losses)
        self._limit(state["step"] + 1, losses[:-1])
        self._limit(state["step"] + 2, losses)


def robust_score(x: float, before: Iterable[float]) -> float:
    """How far `x` is above the median of `before`, in robust standard deviations; infinite where it is no number."""
    middle, spread = middle_and_spread(before)
    return (x - middle) / spread if math.isfinite(x) else math.inf


def limit(before: Iterable[float], threshold: float) -> float:
    """The number whose `robust_score` is `threshold`."""
    middle, spread = middle_and_spread(before)
    return middle + threshold * spread


def middle_and_spread(values: Iterable[float]) -> tuple[float, float]:
    """The median, and a robust standard deviation, which is never quite 0."""
    values = list(values)
    middle = statistics.median(values)
    spread = NORMAL * statistics.median(abs(x - middle) for x in values)
    return middle, max(spread, LEAST_SPREAD * abs(middle), 1e-12)
