"""What the guard over quantised layers found, in events.jsonl and on the terminal."""

from megatrain.base.log import log, warn
from megatrain.engine.guard import Guard, Verdict
from megatrain.train.hook import Handle, Hook, Record


class GuardLog(Hook):
    """Writes each look of the guard once: an event `guard` with the errors, and a line where a layer changed."""

    def __init__(self, guard: Guard, handle: Handle):
        self.guard, self.handle = guard, handle
        self.written: Verdict | None = None

    def after_step(self, record: Record) -> None:
        verdict = self.guard.latest
        if verdict is None or verdict is self.written:
            return
        self.written = verdict
        for name in verdict.demoted:
            warn(
                "%s is off by %.1f%% in eight bits (%.2f%% of its operands became 0): in bf16 from step %d on",
                name,
                100 * verdict.errors[name],
                100 * verdict.flushed[name],
                verdict.step + 1,
            )
        for name in verdict.promoted:
            log("%s is in eight bits again from step %d on", name, verdict.step + 1)
        shares = {"errors": verdict.errors, "saturated": verdict.saturated, "flushed": verdict.flushed}
        self.handle.note(
            "guard",
            before_step=verdict.step + 1,
            loss_gap=round(verdict.loss_gap, 6),
            in_bf16=verdict.in_bf16,
            demoted=verdict.demoted,
            promoted=verdict.promoted,
            **{what: {name: round(min(x, 1e9), 6) for name, x in values.items()} for what, values in shares.items()},
        )
