"""No positions at all: a causal decoder can still tell order (Haviv et al. 2022, arXiv:2203.16634)."""

from dataclasses import dataclass

from torch import Tensor

from megatrain.nn.position import POSITION
from megatrain.parallel.tensor import TensorParallel


@POSITION.register("none")
@dataclass(frozen=True, kw_only=True)
class NoPosition:
    def unsupported_reasons(self, head_dim: int) -> list[str]:
        return []

    def build(self, d_model: int, seq_len: int, tp: TensorParallel) -> None:
        """Nothing is added to the embedded tokens."""

    def prepare(self, positions: Tensor, head_dim: int) -> None:
        """Attention needs nothing."""

    def rotate(self, x: Tensor, tables: None, n_turned: int | None = None) -> Tensor:
        return x

    @classmethod
    def examples(cls) -> list["NoPosition"]:
        return [cls()]
