"""RMSNorm whose weight is kept as the distance from 1 (Gemma Team 2024, arXiv:2403.08295).

Weight decay then pulls towards a gain of 1, and a format of few bits is finest where gains are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatrain.nn.norm import NORM, Placement
from megatrain.nn.norm.rms_norm import RMSNormLayer
from megatrain.parallel.tensor import TensorParallel


@NORM.register("zero_centred_rms_norm")
@dataclass(frozen=True, kw_only=True)
class ZeroCentredRMSNorm:
    eps: float = 1e-6
    """Added to the mean square before the root."""
    placement: Placement = "pre"
    """pre: before each sublayer; post: after each sum, as in 2017; output, parallel: see models/block.py."""

    def problems(self) -> list[str]:
        return [] if self.eps > 0 else [f"eps={self.eps}: it must be above 0"]

    def build(self, width: int, tp: TensorParallel, *, partial: bool | None = None) -> nn.Module:
        """A norm over the last dimension. `partial`: see `TensorParallel.copied`."""
        return ZeroCentredRMSNormLayer(width, self.eps, tp, partial)

    @classmethod
    def examples(cls) -> list["ZeroCentredRMSNorm"]:
        return [cls(), cls(eps=1e-2)]


class ZeroCentredRMSNormLayer(RMSNormLayer):
    """[..., d] -> [..., d]."""

    start = 0.0

    def gain(self) -> Tensor:
        return 1 + self.weight.float()

    def reference(self, x: Tensor) -> Tensor:
        """x / rms(x) * (1 + w), in float64."""
        y = x.double()
        return y / torch.sqrt(y.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight.double())
