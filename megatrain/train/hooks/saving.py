"""A checkpoint every so many steps and at the end."""

from megatrain.train.hook import Handle, Hook, Record


class Saving(Hook):
    """The last hook, so that what it saves includes what the others did with the step."""

    def __init__(self, every: int, handle: Handle):
        self.every, self.handle = every, handle

    def due(self, step: int) -> bool:
        return step == self.handle.total_steps or (self.every > 0 and step % self.every == 0)

    def after_step(self, record: Record) -> None:
        if self.due(record["step"]):
            self.handle.save()
