"""Measuring on a machine that others use too: peers take turns, step by step.

Every peer is a process of its own and warmed up. Then one step is handed to one peer at a time, in an order that
rotates from cycle to cycle, and costs are compared within a cycle: what the neighbours do in those seconds hits all
peers alike. What is compared is CPU time; wall time says little on a shared machine.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


@dataclass
class Peer:
    """A process that takes one step when it is told to."""

    name: str
    process: subprocess.Popen
    losses: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    @classmethod
    def start(cls, name: str, program: Sequence[str], threads: int) -> "Peer":
        """Start and warm up the peer. Others wait: peers that compile side by side only make a machine swap."""
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent.parent)]),
        }
        process = subprocess.Popen(
            [sys.executable, *program], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        peer = cls(name, process)
        peer.losses += peer._read()["losses"]
        return peer

    def step(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        answer = self._read()
        self.losses.append(answer["loss"])
        self.cpu.append(answer["cpu"])
        self.wall.append(answer["wall"])
        self.peak_bytes = answer["peak_bytes"]

    def stop(self) -> None:
        self.process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.name} ended with exit code {self.process.wait()}; what it said stands above")


def run(peers: Sequence[Peer], cycles: int) -> None:
    for cycle in range(cycles):
        first = cycle % len(peers)
        for peer in (*peers[first:], *peers[:first]):
            peer.step()


@dataclass(frozen=True)
class Quartiles:
    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quartiles":
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, median, high)

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f} {self.high:.3f}]"


def speed_ratio(fast: Sequence[float], slow: Sequence[float]) -> Quartiles:
    """How many times the speed of `slow` `fast` has: the quartiles of the cycles' ratios of costs."""
    return Quartiles.of([s / f for f, s in zip(fast, slow, strict=True)])
