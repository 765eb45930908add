"""Numbers of the device brought to the host without the step waiting for them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Readout:
    """Scalars on their way to the host: the copy is queued behind what made them, and only `values` waits for it.

    To read a GPU's tensor directly would wait for everything that was queued after it too, the next step included.
    """

    def __init__(self, *scalars: "Tensor"):
        import torch

        stacked = torch.stack([x.detach().float() for x in scalars])
        self._event: torch.Event | None = None
        if stacked.device.type == "cpu":
            self._host = stacked
            return
        self._host = torch.empty_like(stacked, device="cpu").pin_memory().copy_(stacked, non_blocking=True)
        self._event = torch.Event(stacked.device)
        self._event.record()

    def values(self) -> list[float]:
        """The numbers, waited for where they are still under way."""
        if self._event is not None:
            self._event.synchronize()
        return [float(x) for x in self._host.tolist()]
