"""Warm-up, a long stable phase, a short decay: one trunk, from which runs of several lengths can branch."""

import math
from dataclasses import dataclass
from typing import Literal

from megatrain.optim.schedule import SCHEDULE, progress, range_problems, warming


@SCHEDULE.register("wsd")
@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay:
    """Warm-up, the peak until the last `decay` steps, then down to `floor` at the last step.

        x = (step - (total - decay)) / decay, at least 0
        factor = 1 - (1 - floor) x             shape linear
        factor = 1 - (1 - floor) sqrt(x)       shape one_minus_sqrt

    Papers: Hu et al. 2024, arXiv:2404.06395, section 4.2 (the three phases); Haegele et al. 2024, arXiv:2405.18392,
    section 3 (the square root, and a decay over a tenth to a fifth of the run).
    """

    decay: int
    """Steps of the decay, the last ones of the run."""
    warmup: int = 0
    """Steps of linear warm-up."""
    floor: float = 0.0
    """Fraction of the peak learning rate at the end."""
    shape: Literal["linear", "one_minus_sqrt"] = "one_minus_sqrt"

    def problems(self) -> list[str]:
        found = range_problems(self.warmup, self.floor)
        if self.decay < 0:
            found.append(f"decay={self.decay} must be at least 0 steps")
        return found

    def unsupported_reasons(self, total: int) -> list[str]:
        if self.warmup + self.decay <= total:
            return []
        return [
            f"schedule.warmup={self.warmup} and schedule.decay={self.decay} do not fit in a run of {total} steps: "
            f"make their sum at most {total}"
        ]

    def lr_factor(self, step: int, total: int) -> float:
        x = progress(step, total - self.decay, total)
        if self.shape == "one_minus_sqrt":
            x = math.sqrt(x)
        return warming(step, self.warmup) * (1 - (1 - self.floor) * x)
