"""Attention kinds. To add one, add a file that registers it; the contract test finds it.

A kind sees only its local heads, so tensor parallelism never appears in it. It says which keys a query sees
(`visible`), has a fast path (`attend`) and a slow twin (`reference`), names what it cannot do (`unsupported_reasons`),
and counts its work for the planner (`score_pairs`). One that is no more than a softmax over the visible keys says so
(`blockwise`) and when plain causality is all that limits them (`plain`); then it can be computed in a ring.
"""

from dataclasses import dataclass
from typing import Any

from megatrain.base.registry import Registry


@dataclass(frozen=True)
class AttentionCase:
    """What is asked of an attention kind."""

    head_dim: int
    n_heads: int
    n_kv_heads: int
    causal: bool = True
    packed: bool = False


ATTENTION: Registry[Any] = Registry("attention", "megatrain.nn.attention")
