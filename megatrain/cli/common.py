"""What several commands share: how long work is watched."""

import sys
import time
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from megatrain.base.units import show_bytes, show_count, show_seconds

SECONDS_BETWEEN_LINES = 10.0


class Bar:
    """The stages of work over bytes of input, with their rates and the time left: a bar, or lines where no one watches.

    Used as a context; `stage` and `advance` are what `megatrain.data.build.Watcher` asks for.
    """

    def __init__(self, seconds_between_lines: float = SECONDS_BETWEEN_LINES) -> None:
        console = Console(stderr=True)
        self._watched = console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TextColumn("{task.fields[tokens]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._watched,
        )
        self._task: TaskID | None = None
        self._pause = seconds_between_lines
        self._name, self._total, self._done, self._tokens = "", 0, 0, 0
        self._began = self._told = time.monotonic()

    def stage(self, name: str, total: int) -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=self._total)
        self._name, self._total, self._done, self._tokens = name, total, 0, 0
        self._began = self._told = time.monotonic()
        self._task = self._bar.add_task(name, total=total, tokens="")

    def advance(self, bytes: int, tokens: int) -> None:
        assert self._task is not None, "a stage comes first"
        self._done += bytes
        self._tokens += tokens
        told = f"{show_count(self._tokens)} tokens" if self._tokens else ""
        self._bar.update(self._task, advance=bytes, tokens=told)
        now = time.monotonic()
        if not self._watched and now - self._told >= self._pause:
            self._told = now
            print(self._line(now - self._began, told), file=sys.stderr, flush=True)

    def _line(self, seconds: float, told: str) -> str:
        rate = self._done / max(seconds, 1e-9)
        left = show_seconds((self._total - self._done) / max(rate, 1e-9))
        share = self._done / max(1, self._total)
        return f"{self._name}: {share:.0%}  {show_bytes(rate)}/s  {told}  {left} left"

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()
