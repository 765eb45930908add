"""Weights & Biases, kept at arm's length: it can neither stop a run nor slow a step.

A process of its own talks to wandb. The run writes a line a step into a pipe and never waits for it: when the pipe is
full (a slow disk, a hanging network), lines are dropped and counted. metrics.jsonl has them all.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatrain.base.log import warn
from megatrain.train.hook import Handle, Hook, Record

SECONDS_TO_FINISH = 20.0


def resolve_mode(mode: str, environment: dict[str, str], home: Path) -> str:
    """`auto` is online where there is a key, offline where there is none (sync later with `wandb sync`)."""
    if mode != "auto":
        return mode
    if named := environment.get("WANDB_MODE"):
        return named
    netrc = home / ".netrc"
    has_key = "WANDB_API_KEY" in environment or (netrc.exists() and "api.wandb.ai" in netrc.read_text(errors="ignore"))
    return "online" if has_key else "offline"


class Wandb(Hook):
    """Rank 0 sends every record to the process that talks to wandb."""

    def __init__(self, mode: str, project: str, handle: Handle):
        self.dropped, self.rest = 0, b""
        self.process: subprocess.Popen | None = None
        mode = resolve_mode(mode, dict(os.environ), Path.home())
        if handle.rank != 0 or mode == "disabled":
            return
        settings = {
            "mode": mode,
            "project": project,
            "name": handle.facts["name"],
            "id": handle.facts["run_id"],
            "dir": str(handle.folder),
            "config": handle.config,
        }
        log = open(handle.folder / "wandb.log", "ab")  # noqa: SIM115 (the child keeps it)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megatrain.train.wandb_process"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the run
        )
        log.close()
        assert self.process.stdin is not None
        os.set_blocking(self.process.stdin.fileno(), False)
        self._send(settings)

    def after_step(self, record: Record) -> None:
        if self.process is not None:
            self._send(record)

    def _send(self, message: dict[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        if not self._flush() or self.process is None:
            self.dropped += 1
            return
        self.rest = line
        self._flush()

    def _flush(self) -> bool:
        """Write what is left of the last line; False while the pipe is full or the process is gone."""
        if self.process is None or self.process.stdin is None:
            return False
        try:
            while self.rest:
                self.rest = self.rest[os.write(self.process.stdin.fileno(), self.rest) :]
        except BlockingIOError:
            return False
        except OSError:
            warn("wandb's process has gone (see wandb.log); the run goes on, and metrics.jsonl has everything")
            with contextlib.suppress(OSError):
                self.process.stdin.close()
            self.process.stdin = None
            return False
        return True

    def finish(self, outcome: str) -> None:
        if self.process is None:
            return
        if self.process.stdin is not None:
            self._flush()
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()  # the end of its input is the word to finish
        try:
            self.process.wait(SECONDS_TO_FINISH)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            warn("wandb did not finish within %.0f s and was ended; metrics.jsonl has everything", SECONDS_TO_FINISH)
        if self.dropped:
            warn("%d records were not sent to wandb because it was slow; metrics.jsonl has them all", self.dropped)
        self.process = None
