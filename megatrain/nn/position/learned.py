"""Learned positions (Vaswani et al. 2017, arXiv:1706.03762, section 3.5): one trained vector a position."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.nn.position import POSITION
from megatrain.parallel import collectives
from megatrain.parallel.shard import normal, parameter
from megatrain.parallel.tensor import TensorParallel


@POSITION.register("learned")
@dataclass(frozen=True, kw_only=True)
class Learned:
    init_std: float = 0.02

    def unsupported_reasons(self, head_dim: int) -> list[str]:
        return []

    def build(self, d_model: int, seq_len: int, tp: TensorParallel) -> nn.Module:
        """What is added to the embedded tokens; it knows positions below `seq_len` only."""
        return LearnedPositions(d_model, seq_len, tp, self.init_std)

    def prepare(self, positions: Tensor, head_dim: int) -> None:
        """Attention needs nothing more."""

    def rotate(self, x: Tensor, tables: None, n_turned: int | None = None) -> Tensor:
        return x

    @classmethod
    def examples(cls) -> list["Learned"]:
        return [cls()]


class LearnedPositions(nn.Module):
    """positions [b, t] -> [b, t, d] (or [b, t / size, d] under sequence parallelism)."""

    def __init__(self, d_model: int, seq_len: int, tp: TensorParallel, init_std: float):
        super().__init__()
        self.tp = tp
        # Each rank adds the vectors of its own rows of the sequence, so a cut sequence leaves partial gradients.
        self.weight = parameter(tp.copied((seq_len, d_model), normal(init_std)))

    def forward(self, positions: Tensor) -> Tensor:
        if self.tp.cuts_sequence:
            positions = collectives.own_rows(positions, self.tp.axis)
        return F.embedding(positions, self.weight)

    def reference(self, positions: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(positions, self.weight.shape[0]).double() @ self.weight.double()
