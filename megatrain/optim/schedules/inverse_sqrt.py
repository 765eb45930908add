"""Decay with the square root of the step, which needs no end."""

import math
from dataclasses import dataclass

from megatrain.optim.schedule import SCHEDULE, range_problems, warming, warmup_reasons


@SCHEDULE.register("inverse_sqrt")
@dataclass(frozen=True, kw_only=True)
class InverseSqrt:
    """Warm-up, then the inverse square root of the step, never below `floor`; it does not depend on the run's length.

        factor = step / warmup                     up to step `warmup`
        factor = max(floor, sqrt(warmup / step))   from there on

    Paper: Vaswani et al. 2017, arXiv:1706.03762, equation 3. Differs in scale: the peak is the learning rate given.
    """

    warmup: int
    """Steps of linear warm-up, at least 1: they also set how slow the decay is."""
    floor: float = 0.0
    """Least fraction of the peak learning rate."""

    def problems(self) -> list[str]:
        found = range_problems(self.warmup, self.floor)
        if self.warmup == 0:
            found.append("warmup=0 leaves the inverse square root without a scale: give at least 1 step")
        return found

    def unsupported_reasons(self, total: int) -> list[str]:
        return warmup_reasons(self.warmup, total)

    def lr_factor(self, step: int, total: int) -> float:
        if step < self.warmup:
            return warming(step, self.warmup)
        return max(self.floor, math.sqrt(self.warmup / step))
