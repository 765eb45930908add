"""Activation recomputation: keep a layer's input and run it again in backward, rather than keep all it made
(Chen et al. 2016, arXiv:1604.06174; selective: Korthikanti et al. 2022, arXiv:2205.05198, section 5).

Dropout masks are functions of the element, so the second forward drops what the first did without any saved state.
"""

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

NONE, NORMS, ELEMENTWISE, SELECTIVE, FULL = "none", "norms", "elementwise", "selective", "full"

INSIDE = (NORMS, ELEMENTWISE, SELECTIVE)
"""Parts of a block: to be chosen before blocks are compiled, since the compiler must see them."""


def recompute(layers: nn.ModuleDict, what: str) -> None:
    """Make the blocks in `layers` recompute.

    Args:
        what: none; norms (what they give, where blocks are compiled: the cheapest bytes); elementwise (that and the
            activation of every feed-forward, the widest tensor of a block; in compiled blocks no product is done again
            for either); selective (the attention of every block, whose activations grow fastest with the sequence and
            are cheap to make again); full (every block); or numbers of blocks: `0-3`, `0-3,8`, `0-30:2` (every second
            one), or a shell pattern over them, `*[05]`.
    """
    block: Any
    for name, block in layers.items():
        if what == ELEMENTWISE:
            block.feed_forward.project = _again(block.feed_forward.project)
        if what in (NORMS, ELEMENTWISE):
            for norm in (block.attention_norm, block.feed_forward_norm):
                norm.forward = _again_if_compiled(norm.forward)
                if hasattr(norm, "beside"):
                    norm.beside = _again_if_compiled(norm.beside)
        elif what == SELECTIVE:
            block.attention.forward = _again(block.attention.forward)
        elif recomputes(name, what):
            block.forward = _again(block.forward)


def recomputes(name: str, what: str) -> bool:
    """Whether all of the block of that name is computed again."""
    return what == FULL or int(name) in numbers(what) or fnmatchcase(name, what)


def numbers(what: str) -> set[int]:
    """Block numbers that `0-3,8,10-20:2` names; none where it is no such list."""
    found: set[int] = set()
    for word in what.split(","):
        if (match := re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9})(?::([1-9]\d{0,8}))?)?\s*", word)) is None:
            return set()
        first, last, step = match.groups()
        found.update(range(int(first), int(last or first) + 1, int(step or 1)))
    return found


def unmatched(n_layers: int, what: str) -> list[str]:
    """A sentence if `what` names no block."""
    if what in (NONE, *INSIDE, FULL) or any(recomputes(str(i), what) for i in range(n_layers)):
        return []
    return [
        f"layout.recompute is {what!r}, which is none of {', '.join((NONE, *INSIDE, FULL))} and names no "
        f"block from 0 to {n_layers - 1}: use one of them, or numbers such as 0-3 or 0,2,4"
    ]


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)

    return run


def _again_if_compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Uncompiled it would be for nothing: the product behind keeps what it is given."""
    again = _again(forward)

    def run(*args: Any) -> Any:
        return again(*args) if torch.compiler.is_compiling() else forward(*args)

    return run
