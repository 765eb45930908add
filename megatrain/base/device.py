"""The one place that names devices. The device comes from the run file; all else goes through torch.accelerator."""

import contextlib
import ctypes
import os
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatrain.base.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import dtype as Dtype

KINDS = ("auto", "cpu", "cuda")

PEAK_BF16 = {  # dense BF16 FLOP/s without sparsity, from the vendors' data sheets
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


@dataclass(frozen=True)
class Device:
    """Where tensors live: `kind` is cpu or cuda, `index` this rank's card on its node."""

    kind: str
    index: int = 0

    @classmethod
    def of(cls, kind: str, local_rank: int = 0) -> "Device":
        """The device a run file asks for; `auto` takes a card where there is one.

        Raises:
            ConfigError: cuda is asked for and there is no card for this rank.
        """
        import torch

        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if kind == "auto":
            kind = "cuda" if found else "cpu"
        if kind == "cuda" and local_rank >= found:
            raise ConfigError(
                f"layout.device is cuda but this node has {found} cards and local rank {local_rank} needs one: "
                "start fewer ranks on this node, or set layout.device=cpu"
            )
        return cls(kind, local_rank if kind == "cuda" else 0)

    @property
    def torch(self) -> "torch.device":
        import torch

        return torch.device(self.kind, self.index) if self.kind == "cuda" else torch.device("cpu")

    def capability(self) -> tuple[int, int] | None:
        """Compute capability of the card; None on a CPU."""
        import torch

        return torch.cuda.get_device_capability(self.index) if self.kind == "cuda" else None

    @property
    def backend(self) -> str:
        """The torch.distributed backend of this device; gloo carries CPU tensors beside NCCL's."""
        return "cpu:gloo,cuda:nccl" if self.kind == "cuda" else "gloo"

    @property
    def pins_memory(self) -> bool:
        """Copies to this device overlap computation where they come from page-locked memory."""
        return self.kind != "cpu"

    def use(self) -> None:
        """Make this the current device of the process."""
        import torch

        if self.kind == "cuda":
            torch.accelerator.set_device_index(self.index)
        else:
            _keep_freed_memory()

    def name(self) -> str:
        import torch

        return torch.cuda.get_device_name(self.index) if self.kind == "cuda" else "CPU"

    def peak_flops(self, dtype: "Dtype") -> tuple[float, str]:
        """Peak FLOP/s for matrix products in `dtype`, and where the figure comes from."""
        import torch

        if self.kind == "cuda":
            name = self.name()
            for card, peak in PEAK_BF16.items():
                if card in name:
                    factor = 1.0 if dtype == torch.bfloat16 else 0.5  # TF32 runs at half the rate of BF16
                    return peak * factor, f"data sheet of {card}"
        return _measured_peak(self.torch, dtype), "measured: a square product timed at start"

    def memory_bytes(self) -> int:
        """The most memory this process held so far: on a card what torch reserved, on CPU the resident set."""
        import torch

        if self.kind == "cuda":
            return torch.cuda.max_memory_reserved(self.index)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def synchronize(self) -> None:
        import torch

        if self.kind == "cuda":
            torch.accelerator.synchronize()


class MemoryHistory:
    """Which line asked for which piece of a card's memory; nothing where there is no card."""

    def start(self) -> None:
        import torch

        self._card = torch.cuda.is_available()
        if self._card:
            torch.cuda.memory._record_memory_history(max_entries=100_000)

    def write(self, path: Path) -> None:
        """Write what was recorded since `start`, as torch's memory viewer reads it, and record no more."""
        import torch

        if self._card:
            torch.cuda.memory._dump_snapshot(str(path))
            torch.cuda.memory._record_memory_history(enabled=None)


def _keep_freed_memory() -> None:
    """Let the C library keep what a step frees for the next one, as torch does with a card's memory.

    glibc gives large pieces back to the system at once, and the next step pays for each page anew: 4 to 6% of a step.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library has ways of its own
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the most it takes: larger pieces still come and go
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's numbers of these settings: mallopt(3)."""


def _measured_peak(device: "torch.device", dtype: "torch.dtype", n: int = 512) -> float:
    import time

    import torch

    a = torch.ones(n, n, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(30):  # the best of many: another process may have the core now and then
        begin = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.accelerator.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best


def cpu_threads(local_ranks: int) -> int:
    """Threads for each of `local_ranks` processes on this node, so that they do not fight for cores.

    OMP_NUM_THREADS, where it is set, is the user's word (its first figure: it may list one for each nesting level).
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked.isdecimal():
        return max(1, int(asked))
    return max(1, len(os.sched_getaffinity(0)) // max(1, local_ranks))
