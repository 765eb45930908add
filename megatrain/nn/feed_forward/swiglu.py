"""SwiGLU (Shazeer 2020, arXiv:2002.05202): W_down (silu(W_gate x) * W_up x), gate and up as one product."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.nn.feed_forward import FEED_FORWARD
from megatrain.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatrain.parallel.shard import normal
from megatrain.parallel.tensor import TensorParallel


@FEED_FORWARD.register("swiglu")
@dataclass(frozen=True, kw_only=True)
class SwiGLU:
    bias: bool = False

    def build(self, d_model: int, d_ff: int, tp: TensorParallel, *, init_std: float, out_std: float) -> nn.Module:
        return SwiGLULayer(d_model, d_ff, tp, self.bias, init_std, out_std)

    def n_weights(self, d_model: int, d_ff: int) -> int:
        """Weights in matrix products of one layer."""
        return 3 * d_model * d_ff

    @classmethod
    def examples(cls) -> list["SwiGLU"]:
        return [cls(), cls(bias=True)]


class SwiGLULayer(nn.Module):
    """[b, t, d] -> [b, t, d]."""

    def __init__(self, d_model: int, d_ff: int, tp: TensorParallel, bias: bool, init_std: float, out_std: float):
        super().__init__()
        pieces = (d_ff, d_ff)
        self.gate_up = ColumnParallelLinear(d_model, 2 * d_ff, tp, init=normal(init_std), pieces=pieces, bias=bias)
        self.down = RowParallelLinear(d_ff, d_model, tp, init=normal(out_std), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.gate_up(x))

    def project(self, gate_up: Tensor) -> Tensor:
        """What follows the first product: it may be done again in backward, so that its widest tensor is not kept."""
        return self.down(gated(gate_up))

    def reference(self, x: Tensor) -> Tensor:
        """The paper's equation 6 in float64, on one rank."""
        y = F.linear(x.double(), self.gate_up.weight.double(), _double(self.gate_up.bias))
        gate, up = y.chunk(2, -1)
        return F.linear(gate * torch.sigmoid(gate) * up, self.down.weight.double(), _double(self.down.bias))


def _double(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.double()


def gated(gate_up: Tensor) -> Tensor:
    """silu(first half) * second half: [..., 2f] -> [..., f]."""
    if torch.compiler.is_compiling():  # the compiler fuses the plain form and decides itself what to keep
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up
    return _Gated.apply(gate_up)


class _Gated(torch.autograd.Function):
    """Keeps only its input: silu is computed again in backward, and both gradients are written into one tensor."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        grad = torch.empty_like(gate_up)
        grad_gate, grad_up = grad.chunk(2, -1)
        torch.mul(grads[0], F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=grad_gate)
        return grad
