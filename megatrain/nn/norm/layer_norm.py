"""LayerNorm (Ba et al. 2016, arXiv:1607.06450): centre, divide by the standard deviation, scale and shift."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.nn.norm import NORM, Placement
from megatrain.nn.norm.apex import apex_norms
from megatrain.parallel.shard import constant, parameter
from megatrain.parallel.tensor import TensorParallel


@NORM.register("layer_norm")
@dataclass(frozen=True, kw_only=True)
class LayerNorm:
    eps: float = 1e-5
    """Added to the variance before the root."""
    placement: Placement = "pre"
    """pre: before each sublayer; post: after each sum, as in 2017; output, parallel: see models/block.py."""
    bias: bool = True

    def problems(self) -> list[str]:
        return [] if self.eps > 0 else [f"eps={self.eps}: it must be above 0"]

    def build(self, width: int, tp: TensorParallel, *, partial: bool | None = None) -> nn.Module:
        """A norm over the last dimension. `partial`: see `TensorParallel.copied`."""
        return LayerNormLayer(width, self.eps, self.bias, tp, partial)

    @classmethod
    def examples(cls) -> list["LayerNorm"]:
        return [cls(), cls(bias=False), cls(eps=1e-2)]


class LayerNormLayer(nn.Module):
    """[..., d] -> [..., d]."""

    def __init__(self, width: int, eps: float, bias: bool, tp: TensorParallel, partial: bool | None):
        super().__init__()
        self.eps = eps
        self.weight = parameter(tp.copied((width,), constant(1.0), partial=partial))
        self.bias = parameter(tp.copied((width,), constant(0.0), partial=partial)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        if bias is not None and (apex := apex_norms(x)):  # it has none without a bias
            with torch.autocast("cuda", enabled=False):
                return apex.fused_layer_norm_affine(x, weight, bias, x.shape[-1:], self.eps)
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)

    def reference(self, x: Tensor) -> Tensor:
        """The paper's equation 4, in float64."""
        y = x.double()
        y = y - y.mean(-1, keepdim=True)
        y = y / torch.sqrt(y.square().mean(-1, keepdim=True) + self.eps) * self.weight.double()
        return y if self.bias is None else y + self.bias.double()
