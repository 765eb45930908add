"""The loop: batches into steps until the budget is spent. Everything optional is a hook."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatrain.base.errors import PreemptedError, RunError
from megatrain.base.readout import Readout
from megatrain.engine.api import Engine
from megatrain.nn.batch import Batch
from megatrain.optim.norm import ByParameter
from megatrain.train.hook import Hook, Record
from megatrain.train.stop import StopVote


class Throughput(Protocol):
    """Turns seconds of a step into figures that can be compared."""

    def figures(self, tokens: int, seconds: float) -> Record: ...


@dataclass
class State:
    """Where a run stands; with the engine's tensors, all that a checkpoint needs."""

    step: int = 0
    tokens: int = 0
    """Positions trained on so far, over all ranks."""
    skips: int = 0
    """Steps in a row that were skipped up to now."""
    cursors: Any = None

    def saved(self) -> dict[str, Any]:
        return {"version": 1, "step": self.step, "tokens": self.tokens, "skips": self.skips, "cursors": self.cursors}

    def restore(self, saved: dict[str, Any]) -> None:
        self.step, self.tokens, self.skips = saved["step"], saved["tokens"], saved["skips"]
        self.cursors = saved["cursors"]


@dataclass
class Pending:
    """A step whose numbers are still on their way from the device."""

    step: int
    tokens: int
    """Up to and with this step."""
    n_tokens: int
    """Of this step."""
    lr: float
    data_seconds: float
    begin: float
    numbers: Readout
    """Loss, gradient norm, skipped."""
    batch: Batch
    """This rank's rows of it."""
    cursors: Any
    """Of the data slots before it."""
    by_parameter: ByParameter | None
    seconds: float | None = None
    """From its begin to that of the next step, once that is known."""


@dataclass
class Trainer:
    """One rank's side of a run.

    `global_batch` counts rows over all ranks. `hooks` are called in order; the one that saves comes last.
    """

    state: State
    feed: Iterator[Batch]
    engine: Engine
    schedule: Any
    """lr of a step, from 1: a callable."""
    total_steps: int
    global_batch: int
    max_skips: int
    throughput: Throughput
    vote: StopVote
    hooks: Sequence[Hook] = ()
    go_back: Callable[[], None] = lambda: None
    """Makes state and engine those of the newest checkpoint, except for where the data stands."""
    stopping: bool = False
    """Set by a hook, on every rank at the same step: stop after this one."""
    rewinding: bool = False
    """Set by a hook, on every rank at the same step: go back after this one, and save nothing before."""
    most_loss: dict[int, float] = field(default_factory=dict)
    """Steps to come that are not taken if their loss is above this."""
    delivered: Pending | None = None
    """The step whose numbers hooks are told now."""
    _pending: Pending | None = None

    def run(self) -> None:
        """Train until the budget is spent.

        Raises:
            PreemptedError: the run was asked to stop, and was saved.
            RunError: more than `max_skips` steps in a row had no finite gradient.
        """
        while self.state.step < self.total_steps:
            self.step()
            if self.state.step == self.total_steps:
                self.deliver()  # no step follows that would
            self._go_back_if_asked()
            agreed = self.vote.agreed()  # asked on every rank at every step, whatever a hook says
            if (agreed or self.stopping) and self.state.step < self.total_steps:
                self.deliver()
                self._go_back_if_asked()
                raise PreemptedError(f"stopped after step {self.state.step} of {self.total_steps}, as asked")

    def _go_back_if_asked(self) -> None:
        if self.rewinding:
            self.deliver()
            self.most_loss.clear()
            self.go_back()
            self.rewinding = False

    def step(self) -> None:
        """One step. Its numbers are read while the next one runs, unless a hook needs the state of this very step."""
        begin = time.perf_counter()
        if self._pending is not None:
            self._pending.seconds = begin - self._pending.begin
        batch = next(self.feed)
        waited = time.perf_counter() - begin
        number = self.state.step + 1
        lr = self.schedule(number)
        report = self.engine.step(batch, lr, self.most_loss.pop(number, math.inf))
        numbers = Readout(report.loss, report.grad_norm, report.skipped)
        self.deliver()
        self.state.step = number
        before = self.state.cursors
        n_tokens = self.global_batch * batch.tokens.shape[1]
        self.state.tokens += n_tokens
        self.state.cursors = batch.cursors
        self._pending = Pending(
            number, self.state.tokens, n_tokens, lr, waited, begin, numbers, batch, before, report.by_parameter
        )
        if any(hook.due(number) for hook in self.hooks):
            self.deliver()

    def deliver(self) -> None:
        """Read the numbers of the last step, which waits for it, and hand them to the hooks."""
        self.delivered = pending = self._pending
        self._pending = None
        if pending is None:
            return
        loss, grad_norm, skipped = pending.numbers.values()
        record: Record = {
            "step": pending.step,
            "tokens": pending.tokens,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": pending.lr,
        }
        seconds = time.perf_counter() - pending.begin if pending.seconds is None else pending.seconds
        record |= self.throughput.figures(pending.n_tokens, seconds)
        record |= {"data_seconds": round(pending.data_seconds, 6), "skipped": int(skipped)}
        self._count_skips(record)
        for hook in self.hooks:
            hook.after_step(record)

    def _count_skips(self, record: Record) -> None:
        self.state.skips = self.state.skips + 1 if record["skipped"] else 0
        if self.state.skips > self.max_skips:
            raise RunError(
                f"{self.state.skips} steps in a row (up to step {record['step']}) were not taken, since a gradient was "
                f"not finite or the loss above a hook's limit; that is more than train.max_skips={self.max_skips}: "
                "lower the learning rate, or look at the data of these steps"
            )
