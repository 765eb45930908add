"""GeGLU (Shazeer 2020, arXiv:2002.05202): W_down (gelu(W_gate x) * W_up x), gate and up as one product."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.nn.feed_forward import FEED_FORWARD
from megatrain.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatrain.parallel.shard import normal
from megatrain.parallel.tensor import TensorParallel


@FEED_FORWARD.register("geglu")
@dataclass(frozen=True, kw_only=True)
class GeGLU:
    bias: bool = False
    approximate: Literal["none", "tanh"] = "tanh"
    """none: by the error function, as T5 1.1 has it; tanh: approximated, as Gemma has it."""

    def build(self, d_model: int, d_ff: int, tp: TensorParallel, *, init_std: float, out_std: float) -> nn.Module:
        return GeGLULayer(d_model, d_ff, tp, self, init_std, out_std)

    def n_weights(self, d_model: int, d_ff: int) -> int:
        """Weights in matrix products of one layer."""
        return 3 * d_model * d_ff

    @classmethod
    def examples(cls) -> list["GeGLU"]:
        return [cls(), cls(bias=True, approximate="none")]


class GeGLULayer(nn.Module):
    """[b, t, d] -> [b, t, d]."""

    def __init__(self, d_model: int, d_ff: int, tp: TensorParallel, choice: GeGLU, init_std: float, out_std: float):
        super().__init__()
        self.approximate = choice.approximate
        pieces = (d_ff, d_ff)
        self.gate_up = ColumnParallelLinear(
            d_model, 2 * d_ff, tp, init=normal(init_std), pieces=pieces, bias=choice.bias
        )
        self.down = RowParallelLinear(d_ff, d_model, tp, init=normal(out_std), bias=choice.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.gate_up(x))

    def project(self, gate_up: Tensor) -> Tensor:
        """What follows the first product: it may be done again in backward, so that its widest tensor is not kept."""
        gate, up = gate_up.chunk(2, -1)
        return self.down(F.gelu(gate, approximate=self.approximate) * up)

    def reference(self, x: Tensor) -> Tensor:
        """The paper's equation 6 with x Phi(x) (or its tanh form) in float64, on one rank."""
        bias = None if self.gate_up.bias is None else self.gate_up.bias.double()
        gate, up = F.linear(x.double(), self.gate_up.weight.double(), bias).chunk(2, -1)
        if self.approximate == "tanh":
            share = (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) / 2
        else:
            share = (1 + torch.erf(gate / math.sqrt(2))) / 2
        bias = None if self.down.bias is None else self.down.bias.double()
        return F.linear(gate * share * up, self.down.weight.double(), bias)
