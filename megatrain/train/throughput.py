"""Tokens per second and MFU of a step, with what they are divided by."""

from dataclasses import dataclass

from megatrain.base.device import Device
from megatrain.models.decoder import Flops
from megatrain.train.hook import Record


@dataclass(frozen=True)
class Throughput:
    """MFU = model FLOPs of the step / (seconds x peak FLOP/s x devices).

    `flops` are those of one token; `peak` is one device's FLOP/s for the compute format.
    """

    flops: Flops
    peak: float
    peak_source: str
    devices: int
    device: Device

    def figures(self, tokens: int, seconds: float) -> Record:
        """Figures of a step of `tokens` positions over all devices that took `seconds`."""
        available = seconds * self.peak * self.devices
        return {
            "tokens_per_second": round(tokens / seconds, 1),
            "step_seconds": round(seconds, 6),
            "mfu": round(tokens * self.flops.causal / available, 5),
            "mfu_palm": round(tokens * self.flops.palm / available, 5),
            "memory_gib": round(self.device.memory_bytes() / 2**30, 4),
        }
