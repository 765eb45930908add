"""Half a cosine down to the floor."""

import math
from dataclasses import dataclass

from megatrain.optim.schedule import SCHEDULE, progress, range_problems, warming, warmup_reasons


@SCHEDULE.register("cosine")
@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Warm-up, then half a cosine from the peak at step `warmup` to `floor` at the last step.

        x = (step - warmup) / (total - warmup)
        factor = floor + (1 - floor) (1 + cos(pi x)) / 2

    Paper: Loshchilov and Hutter 2016, arXiv:1608.03983, equation 5, without restarts. Differs in the warm-up.
    """

    warmup: int = 0
    """Steps of linear warm-up."""
    floor: float = 0.1
    """Fraction of the peak learning rate at the end."""

    def problems(self) -> list[str]:
        return range_problems(self.warmup, self.floor)

    def unsupported_reasons(self, total: int) -> list[str]:
        return warmup_reasons(self.warmup, total)

    def lr_factor(self, step: int, total: int) -> float:
        if step < self.warmup:
            return warming(step, self.warmup)
        x = progress(step, self.warmup, total)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * x)) / 2
