"""A checkpoint every so many steps and at the end."""

from megatrain.train.hook import Periodic, Record


class Saving(Periodic):
    """The last hook, so that what it saves includes what the others did with the step."""

    def after_step(self, record: Record) -> None:
        if self.due(record["step"]):
            self.handle.save(record.get("held_out_loss"))
