"""Stopping in good order: signals heard by one rank, and one step at which all ranks stop."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from megatrain.base.errors import EXIT_PREEMPTED
from megatrain.parallel.mesh import Axis

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

SAME_WORD_SECONDS = 1.0
"""A launcher forwards Ctrl-C that the terminal has sent already: two within this time are one."""


class StopRequest:
    """Whether this process was asked to stop. The first word ends the step under way, a second Ctrl-C the process.

    A second SIGTERM is not heard: torchrun's agent sends one to the ranks that still save when the first has left.
    """

    def __init__(self) -> None:
        self.asked = False
        self._first = 0.0

    def ask(self) -> None:
        self.asked = True

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Hear SIGINT, SIGTERM and SIGUSR1 (what schedulers send ahead of a time limit) while inside.

        In a thread that is not the main one, as in a notebook's, Python hears no signals: nothing is changed there.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        former = {number: signal.signal(number, self._hear) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked and now - self._first > SAME_WORD_SECONDS and number == signal.SIGINT:
            os._exit(EXIT_PREEMPTED)  # the last commit is what is left, as after a kill
        if not self.asked:
            self._first = now
        self.asked = True


class StopVote:
    """All ranks learn together, one step late and without waiting, whether any was asked to stop."""

    def __init__(self, request: StopRequest, world: Axis):
        self.request, self.world = request, world
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._work: Any = None

    def agreed(self) -> bool:
        """Called once a step by every rank; true for all of them at the same step."""
        if self.world.size == 1:
            return self.request.asked
        stop = False
        if self._work is not None:
            self._work.wait()
            stop = bool(self._flag.item())
        self._flag.fill_(int(self.request.asked))
        self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self.world.group, async_op=True)
        return stop

    def close(self) -> None:
        """Let the last vote finish, so that nothing is under way when the group goes."""
        if self._work is not None:
            self._work.wait()
            self._work = None
