"""A straight line down to the floor."""

from dataclasses import dataclass

from megatrain.optim.schedule import SCHEDULE, progress, range_problems, warming, warmup_reasons


@SCHEDULE.register("linear")
@dataclass(frozen=True, kw_only=True)
class Linear:
    """Warm-up, then a line from the peak at step `warmup` to `floor` at the last step.

        x = (step - warmup) / (total - warmup)
        factor = 1 - (1 - floor) x

    Paper: Defazio et al. 2023, arXiv:2310.07831, which finds the line to 0 the best of the usual schedules.
    """

    warmup: int = 0
    """Steps of linear warm-up."""
    floor: float = 0.0
    """Fraction of the peak learning rate at the end."""

    def problems(self) -> list[str]:
        return range_problems(self.warmup, self.floor)

    def unsupported_reasons(self, total: int) -> list[str]:
        return warmup_reasons(self.warmup, total)

    def lr_factor(self, step: int, total: int) -> float:
        if step < self.warmup:
            return warming(step, self.warmup)
        return 1 - (1 - self.floor) * progress(step, self.warmup, total)
