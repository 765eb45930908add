"""Stochastic rounding to bf16: up or down with the chances that make the mean exact.

A plain rounding loses every update below half a step of the format, so weights in pure bf16 stall; a stochastic one
keeps them in the mean (Gupta et al. 2015, arXiv:1502.02551, section 3).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatrain.base.random import seed_of
from megatrain.nn.hashing import mix
from megatrain.optim.whole import Held, matrix_shape, tiles


def rounded(x: Tensor, bits: Tensor) -> Tensor:
    """float32 -> bf16, stochastically.

    Args:
        bits: int64 of the shape of `x`; the low 16 are uniform.

    The 16 bits that bf16 drops are a fraction of its step; added to a uniform number of 16 bits, they carry into the
    bits that stay just as often as that fraction says. Infinities and NaN are left as they are.
    """
    moved = (x.view(torch.int32) + (bits & 0xFFFF).int()) & -0x10000
    return torch.where(torch.isfinite(x), moved.view(torch.float32), x).bfloat16()


def round_stochastically(x: Tensor, was: Tensor, step: Tensor, held: Sequence[Held]) -> Tensor:
    """`x` as bf16, by random bits that are a function of (parameter, step, element of the full tensor).

    Args:
        x: float32, a tensor that holds the ranges `held`.
        was: bf16; where `x` still equals it, it stays.
        step: float32 scalar on the device, the number of the step.
    """
    out = was.clone()
    for h in held:
        key = mix(step.long() ^ seed_of(0, "stochastic rounding", h.name))
        bits = mix(elements(h, x.device) ^ key)
        h.of(out).copy_(rounded(h.of(x), bits))
    return out


def elements(h: Held, device: torch.device) -> Tensor:
    """int64 [numel]: which element of the full tensor each of the range is."""
    n = matrix_shape(h.shard.full_shape)[1]
    parts = []
    for tile in tiles(h.shard, h.start, h.numel):
        rows = torch.arange(tile.row, tile.row + tile.n_rows, device=device)[:, None] * n
        parts.append((rows + torch.arange(tile.column, tile.column + tile.n_columns, device=device)).flatten())
    return torch.cat(parts)
