"""Causal attention: a token sees itself and what precedes it (Vaswani et al. 2017, arXiv:1706.03762)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from megatrain.nn.attention import ATTENTION, AttentionCase
from megatrain.nn.attention.kernel import dense, scaled_dot_product
from megatrain.nn.where import Borders, Where


@ATTENTION.register("causal")
@dataclass(frozen=True, kw_only=True)
class Causal:
    qk_norm: bool = False
    """Normalise queries and keys before the product (Henry et al. 2020, arXiv:2010.04245)."""
    qk_norm_over: Literal["head", "width"] = "head"
    """Each head for itself, or all heads of a token together (OLMo et al. 2025, arXiv:2501.00656, section 3.2)."""
    bias: bool = False
    """Biases in the projections to queries, keys and values."""

    blockwise: ClassVar[bool] = True
    """It is a softmax over the visible keys and nothing else, so parts over some of the keys can be merged."""

    def unsupported_reasons(self, case: AttentionCase) -> list[str]:
        return [] if case.causal else ["causal attention looks back only"]

    def visible(self, q: Tensor, k: Tensor) -> Tensor:
        """Which keys a query sees, from positions that broadcast: bool."""
        return q >= k

    def plain(self, packed: bool, seq_len: int) -> bool:
        """Over such rows nothing but causality limits what is seen, which kernels know by themselves."""
        return not packed

    def prepare(self, where: Where) -> Tensor | Borders | None:
        """The mask of a pass or its documents' borders, or None where the kernel's own causal path does."""
        return None if self.plain(where.packed, where.positions.shape[1]) else where.limits(self.visible)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor:
        return scaled_dot_product(q, k, v, where.mask, causal=True)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor:
        return dense(q, k, v, where.visible(self.visible))

    def score_pairs(self, seq_len: int) -> float:
        """Pairs of query and key of one sequence, per head: the half square that MFU counts."""
        return seq_len * seq_len / 2

    @classmethod
    def examples(cls) -> list["Causal"]:
        return [cls(), cls(qk_norm=True), cls(qk_norm=True, qk_norm_over="width"), cls(bias=True)]
