"""Progress on the terminal: a bar where there is a terminal, a line now and then where there is none."""

import sys
import time
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megatrain.base.units import show_count, show_seconds
from megatrain.train.hook import Handle, Hook, Record

SECONDS_BETWEEN_LINES = 10.0


class Console(Hook):
    """Loss, tokens/s, MFU and time left, on rank 0."""

    def __init__(self, handle: Handle):
        self.total = handle.total_steps
        self.rank, self.first = handle.rank, handle.first_step
        self.bar: Progress | None = None
        self.task: Any = None
        self.next_line = 0.0
        self.began, self.began_step = time.monotonic(), handle.first_step - 1
        if self.rank == 0 and sys.stderr.isatty():
            self.bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.fields[words]}"),
                TimeRemainingColumn(),
                console=RichConsole(stderr=True),
            )
            self.task = self.bar.add_task("", total=self.total, completed=self.first - 1, words="")
            self.bar.start()

    def after_step(self, record: Record) -> None:
        if self.rank != 0:
            return
        step, words = record["step"], describe(record)
        if self.bar is not None:
            self.bar.update(self.task, completed=step, words=words)
            if "held_out_loss" in record:
                self.bar.console.print(f"step {step}: {words}")
        elif step in (self.first, self.total) or "held_out_loss" in record or time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            print(f"step {step}/{self.total}  {words}  {self._left(step)}", file=sys.stderr, flush=True)

    def _left(self, step: int) -> str:
        done = step - self.began_step
        seconds = (time.monotonic() - self.began) / max(1, done) * (self.total - step)
        return f"{show_seconds(seconds)} left"

    def finish(self, outcome: str) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def describe(record: Record) -> str:
    """A record in one line for people."""
    words = [
        f"loss {record['loss']:.3f}",
        f"{show_count(record['tokens_per_second'])} tok/s",
        f"MFU {record['mfu']:.1%}",
    ]
    if "held_out_loss" in record:
        words.append(f"held-out {record['held_out_loss']:.3f} ({record['bits_per_byte']:.3f} bits/byte)")
    if record["skipped"]:
        words.append("SKIPPED: gradient not finite")
    return "  ".join(words)
