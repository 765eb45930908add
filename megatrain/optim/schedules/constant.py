"""No decay."""

from dataclasses import dataclass

from megatrain.optim.schedule import SCHEDULE, range_problems, warming, warmup_reasons


@SCHEDULE.register("constant")
@dataclass(frozen=True, kw_only=True)
class Constant:
    """Warm-up, then the peak for ever: factor = min(1, step / warmup)."""

    warmup: int = 0
    """Steps of linear warm-up."""

    def problems(self) -> list[str]:
        return range_problems(self.warmup)

    def unsupported_reasons(self, total: int) -> list[str]:
        return warmup_reasons(self.warmup, total)

    def lr_factor(self, step: int, total: int) -> float:
        return warming(step, self.warmup)
