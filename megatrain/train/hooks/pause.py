"""Stop at a step as a preempted run does: saved, resumable, exit code 75. For demonstrations and budgets of hours."""

from dataclasses import dataclass

from megatrain.train.hook import Handle, Hook, Record
from megatrain.train.hooks import HOOK


@HOOK.register("pause")
@dataclass(frozen=True, kw_only=True)
class Pause:
    at: int
    """The last step before the run stops. Started again, it passes this step and goes on."""

    def problems(self) -> list[str]:
        return [] if self.at >= 1 else [f"at={self.at}: the first step is 1"]

    def build(self, handle: Handle) -> Hook:
        return _Pause(self.at, handle)


class _Pause(Hook):
    def __init__(self, at: int, handle: Handle):
        self.at, self.handle = at, handle

    def due(self, step: int) -> bool:
        return step == self.at

    def after_step(self, record: Record) -> None:
        if record["step"] == self.at:
            self.handle.stop()
