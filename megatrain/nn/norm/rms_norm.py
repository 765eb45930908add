"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467): divide by the root mean square, scale by a learned weight."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.nn.norm import NORM, Placement
from megatrain.nn.norm.apex import apex_norms
from megatrain.parallel import collectives
from megatrain.parallel.shard import constant, parameter
from megatrain.parallel.tensor import TensorParallel

WIDEST = 8192
"""Channels that the kernel in `rms_kernel` takes."""


@NORM.register("rms_norm")
@dataclass(frozen=True, kw_only=True)
class RMSNorm:
    eps: float = 1e-5
    """Added to the mean square before the root."""
    placement: Placement = "pre"
    """pre: before each sublayer; post: after each sum, as in 2017; output, parallel: see models/block.py."""

    def problems(self) -> list[str]:
        return [] if self.eps > 0 else [f"eps={self.eps}: it must be above 0"]

    def build(self, width: int, tp: TensorParallel, *, partial: bool | None = None) -> nn.Module:
        """A norm over the last dimension. `partial`: see `TensorParallel.copied`."""
        return RMSNormLayer(width, self.eps, tp, partial)

    def build_cut(self, width: int, tp: TensorParallel) -> nn.Module:
        """A norm over a dimension of `width` that is cut over the tensor-parallel ranks."""
        return CutRMSNorm(width, self.eps, tp)

    @classmethod
    def examples(cls) -> list["RMSNorm"]:
        return [cls(), cls(eps=1e-2)]


class RMSNormLayer(nn.Module):
    """[..., d] -> [..., d]."""

    start = 1.0

    def __init__(self, width: int, eps: float, tp: TensorParallel, partial: bool | None):
        super().__init__()
        self.eps = eps
        self.weight = parameter(tp.copied((width,), constant(self.start), partial=partial))

    def gain(self) -> Tensor:
        """By what each channel is multiplied."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _FusedOnCPU.apply(x, self.gain(), self.eps)
        gain = self.gain().to(x.dtype)
        if apex := apex_norms(x):
            with torch.autocast("cuda", enabled=False):
                return apex.fused_rms_norm_affine(x, gain, x.shape[-1:], self.eps)
        return F.rms_norm(x, x.shape[-1:], gain, self.eps)

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` as it goes on beside the norm, and what the norm gives: so the gradients of both are made in one.

        For what is compiled for a GPU.
        """
        if x.shape[-1] > WIDEST:
            return x, self(x)
        return _Beside.apply(x, self.gain(), self.eps)

    def reference(self, x: Tensor) -> Tensor:
        """The paper's equation 4, in float64."""
        y = x.double()
        return y / torch.sqrt(y.square().mean(-1, keepdim=True) + self.eps) * self.weight.double()


class CutRMSNorm(nn.Module):
    """[..., d / size] -> the same: each rank holds some channels, and the mean square is that of all of them."""

    def __init__(self, width: int, eps: float, tp: TensorParallel):
        super().__init__()
        self.width, self.eps, self.axis = width, eps, tp.axis
        self.weight = parameter(tp.cut((width,), constant(1.0), 0))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        total = collectives.total(y.square().sum(-1, keepdim=True), self.axis)
        return (y * torch.rsqrt(total / self.width + self.eps) * self.weight.float()).to(x.dtype)

    def reference(self, x: Tensor) -> Tensor:
        """The paper's equation 4, in float64, on one rank."""
        y = x.double()
        return y / torch.sqrt(y.square().mean(-1, keepdim=True) + self.eps) * self.weight.double()


class _Beside(torch.autograd.Function):
    """For the compiler, which makes one kernel of the forward and what stands before it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y = x.float()
        rate = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, rate, gain)
        return x.view_as(x), (y * rate * gain).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        from megatrain.nn.norm import rms_kernel  # Triton comes with torch for GPUs only

        x, rate, gain = ctx.saved_tensors
        grad_x, grad_gain = rms_kernel.backward(grads[1], x, rate, gain, grads[0])
        return grad_x, grad_gain.sum(0).to(gain.dtype), None


class _FusedOnCPU(torch.autograd.Function):
    """torch has one kernel for this norm on a GPU and a dozen on a CPU; LayerNorm's gradient, which is one, serves.

    Given a mean of 0 it is this norm's gradient less its own mean over the row, which is then added again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = x.float()
        rate = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, rate, weight)
        return (y * rate).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, rate, weight = ctx.saved_tensors
        grad, gain, width = grads[0].float(), weight.float(), x.shape[-1]
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x.float(), (width,), torch.zeros_like(rate), rate, gain, None, (True, True, False)
        )
        grad_x.addcmul_((grad @ gain)[..., None], rate, value=1 / width)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None
