"""Held-out loss every so many steps and at the end."""

from megatrain.train.hook import Periodic, Record


class Evaluation(Periodic):
    """Adds `held_out_loss` (nats per token) and `bits_per_byte` to the record of a step."""

    def after_step(self, record: Record) -> None:
        if self.due(record["step"]):
            record |= self.handle.evaluate()
