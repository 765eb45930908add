"""Held-out loss every so many steps and at the end."""

from megatrain.train.hook import Handle, Hook, Record


class Evaluation(Hook):
    """Adds `held_out_loss` (nats per token) and `bits_per_byte` to the record of a step."""

    def __init__(self, every: int, handle: Handle):
        self.every, self.handle = every, handle

    def due(self, step: int) -> bool:
        return step == self.handle.total_steps or (self.every > 0 and step % self.every == 0)

    def after_step(self, record: Record) -> None:
        if self.due(record["step"]):
            record |= self.handle.evaluate()
