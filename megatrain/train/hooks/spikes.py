"""Loss spikes: which documents were in the batch, where gradients and activations were large.

A spike is a loss far above those before it, measured by their median and the median of their distances from it, which
earlier spikes do not move.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from megatrain.base.log import warn
from megatrain.train.hook import Handle, Hook, Record
from megatrain.train.hooks import HOOK

NORMAL = 1.4826
"""The standard deviation of a normal distribution in medians of distances from the median."""
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

    def problems(self) -> list[str]:
        found = [] if self.threshold > 0 else [f"threshold={self.threshold} must be above 0"]
        if not 2 <= self.after <= self.window:
            found.append(f"after={self.after} must be from 2 to window={self.window}")
        return found

    def build(self, handle: Handle) -> Hook:
        return _Spikes(self, handle)


class _Spikes(Hook):
    """Writes an event `spike`. The loss is the same on every rank, so all of them examine the same step."""

    def __init__(self, choice: Spikes, handle: Handle):
        self.choice, self.handle = choice, handle
        self.losses: deque[float] = deque(maxlen=choice.window)

    def after_step(self, record: Record) -> None:
        loss = record["loss"]
        score = robust_score(loss, self.losses) if len(self.losses) >= self.choice.after else 0.0
        if score > self.choice.threshold:
            warn("loss %.3f at step %d is a spike (%.1f robust deviations)", loss, record["step"], score)
            facts = {"loss": loss, "grad_norm": record["grad_norm"], "score": min(round(score, 2), 1e9)}
            self.handle.note("spike", at_step=record["step"], **facts, **self.handle.examine())
        if math.isfinite(loss):
            self.losses.append(loss)


def robust_score(x: float, before: Sequence[float] | deque[float]) -> float:
    """How far `x` is above the median of `before`, in robust standard deviations; infinite where it is no number."""
    if not math.isfinite(x):
        return math.inf
    middle = statistics.median(before)
    spread = NORMAL * statistics.median(abs(y - middle) for y in before)
    return (x - middle) / max(spread, LEAST_SPREAD * abs(middle), 1e-12)
