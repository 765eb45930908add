"""What a learning-rate schedule is: a pure function of the step, with no state to save."""

from typing import Any, Protocol

from megatrain.base.registry import Registry


class Schedule(Protocol):
    """A choice of the run file's `schedule` section, registered in `SCHEDULE`."""

    def lr_factor(self, step: int, total: int) -> float:
        """What the peak learning rate is multiplied by.

        Args:
            step: number of the step that is taken, from 1, as in a run's metrics.
            total: steps of the whole run; `step` may go beyond it, and the factor then stays at its last value.
        """
        ...

    def unsupported_reasons(self, total: int) -> list[str]:
        """Why it does not fit a run of `total` steps, in sentences."""
        ...


def warming(step: int, warmup: int) -> float:
    """Linear warm-up: step / warmup, 1 from step `warmup` on (Goyal et al. 2017, arXiv:1706.02677, section 2.2)."""
    return min(1.0, step / warmup) if warmup else 1.0


def progress(step: int, begin: int, total: int) -> float:
    """How far `step` is on the way from `begin` (0) to `total` (1); 0 where there is no way to go."""
    if total <= begin:
        return 0.0
    return min(1.0, max(0.0, (step - begin) / (total - begin)))


def range_problems(warmup: int, floor: float = 0.0) -> list[str]:
    """What is wrong with these fields, in sentences."""
    found = []
    if warmup < 0:
        found.append(f"warmup={warmup} must be at least 0 steps")
    if not 0 <= floor <= 1:
        found.append(f"floor={floor} must be a fraction of the peak learning rate, from 0 to 1")
    return found


def warmup_reasons(warmup: int, total: int) -> list[str]:
    if warmup < total or not warmup:
        return []
    return [f"schedule.warmup={warmup} steps leaves nothing of a run of {total} steps: make it less than {total}"]


SCHEDULE: Registry[Any] = Registry("schedule", "megatrain.optim.schedules")
