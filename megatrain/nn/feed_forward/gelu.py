"""The feed-forward layer of 2017 with GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415): W_down gelu(W_up x)."""

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


@FEED_FORWARD.register("gelu")
@dataclass(frozen=True, kw_only=True)
class GELU:
    bias: bool = False
    approximate: Literal["none", "tanh"] = "none"
    """none: by the error function; tanh: the paper's approximation, as GPT-2 has it."""

    def build(self, d_model: int, d_ff: int, tp: TensorParallel, *, init_std: float, out_std: float) -> nn.Module:
        return GELULayer(d_model, d_ff, tp, self, init_std, out_std)

    def n_weights(self, d_model: int, d_ff: int) -> int:
        """Weights in matrix products of one layer."""
        return 2 * d_model * d_ff

    @classmethod
    def examples(cls) -> list["GELU"]:
        return [cls(), cls(bias=True), cls(approximate="tanh")]


class GELULayer(nn.Module):
    """[b, t, d] -> [b, t, d]."""

    def __init__(self, d_model: int, d_ff: int, tp: TensorParallel, choice: GELU, init_std: float, out_std: float):
        super().__init__()
        self.approximate = choice.approximate
        self.up = ColumnParallelLinear(d_model, d_ff, tp, init=normal(init_std), bias=choice.bias)
        self.down = RowParallelLinear(d_ff, d_model, tp, init=normal(out_std), bias=choice.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.up(x))

    def project(self, x: Tensor) -> Tensor:
        """What follows the first product: it may be done again in backward, so that its widest tensor is not kept."""
        return self.down(F.gelu(x, approximate=self.approximate))

    def reference(self, x: Tensor) -> Tensor:
        """x Phi(x) (or the paper's tanh form) in float64, on one rank."""
        bias = None if self.up.bias is None else self.up.bias.double()
        y = F.linear(x.double(), self.up.weight.double(), bias)
        if self.approximate == "tanh":
            share = (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))) / 2
        else:
            share = (1 + torch.erf(y / math.sqrt(2))) / 2
        bias = None if self.down.bias is None else self.down.bias.double()
        return F.linear(y * share, self.down.weight.double(), bias)
