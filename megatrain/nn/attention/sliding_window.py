"""Causal attention to the latest `window` keys (Beltagy et al. 2020, arXiv:2004.05150, section 3.1)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from megatrain.nn.attention import ATTENTION, AttentionCase
from megatrain.nn.attention.kernel import dense, scaled_dot_product
from megatrain.nn.where import Borders, Where


@ATTENTION.register("sliding_window")
@dataclass(frozen=True, kw_only=True)
class SlidingWindow:
    window: int
    """Keys a query may see, its own included: 1 sees only itself."""
    qk_norm: bool = False
    """Normalise queries and keys before the product (Henry et al. 2020, arXiv:2010.04245)."""
    qk_norm_over: Literal["head", "width"] = "head"
    """Each head for itself, or all heads of a token together (OLMo et al. 2025, arXiv:2501.00656, section 3.2)."""
    bias: bool = False
    """Biases in the projections to queries, keys and values."""

    blockwise: ClassVar[bool] = True
    """It is a softmax over the visible keys and nothing else, so parts over some of the keys can be merged."""

    def problems(self) -> list[str]:
        return [] if self.window >= 1 else [f"window={self.window}: a query sees at least itself, so 1 or more"]

    def unsupported_reasons(self, case: AttentionCase) -> list[str]:
        return [] if case.causal else ["a sliding window looks back only"]

    def visible(self, q: Tensor, k: Tensor) -> Tensor:
        """Which keys a query sees, from positions that broadcast: bool."""
        behind = q - k
        return (behind >= 0) & (behind < self.window)

    def plain(self, packed: bool, seq_len: int) -> bool:
        """Over such rows nothing but causality limits what is seen, which kernels know by themselves."""
        return not packed and seq_len <= self.window

    def prepare(self, where: Where) -> Tensor | Borders | None:
        """The mask of a pass or its documents' borders, or None where the window covers the whole row."""
        return None if self.plain(where.packed, where.positions.shape[1]) else where.limits(self.visible)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor:
        return scaled_dot_product(q, k, v, where.mask, causal=True, window=self.window)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor:
        return dense(q, k, v, where.visible(self.visible))

    def score_pairs(self, seq_len: int) -> float:
        """Pairs of query and key of one sequence, per head, counted as MFU does (half a square within the window)."""
        w = min(self.window, seq_len)
        return w * w / 2 + (seq_len - w) * w

    @classmethod
    def examples(cls) -> list["SlidingWindow"]:
        return [cls(window=1), cls(window=4), cls(window=4096)]
