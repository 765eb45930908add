"""Dropout (Srivastava et al. 2014) whose mask is a function of the element, not of a hidden generator.

Whether an element is dropped is a hash of (seed, step, layer, row of the global batch, token, channel). So the masks of
a step are the same under every layout, micro-batch size and recomputation, which hidden random state can never promise.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.base.random import seed_of


@dataclass(frozen=True)
class Noise:
    """Names the elements of one micro-batch: `key` int64 [] is drawn from (seed, step)."""

    key: Tensor
    first_row: int
    first_token: int
    seq_len: int


class Dropout(nn.Module):
    """Zero a share of the elements of [b, t, d] and scale up the rest. `name` sets this layer apart from others."""

    def __init__(self, share: float, name: str):
        super().__init__()
        self.share, self.salt = share, seed_of(0, "dropout", name)

    def forward(self, x: Tensor, noise: Noise | None) -> Tensor:
        if noise is None or self.share == 0:
            return x
        keep = kept(tuple(x.shape), noise, self.salt, self.share)
        return _Drop.apply(x, keep, 1 / (1 - self.share))


def kept(shape: tuple[int, ...], noise: Noise, salt: int, share: float) -> Tensor:
    """bool [b, t, d]: which elements stay; each with probability 1 - `share`, independently."""
    b, t, d = shape
    device = noise.key.device
    rows = torch.arange(noise.first_row, noise.first_row + b, device=device)[:, None, None]
    tokens = torch.arange(noise.first_token, noise.first_token + t, device=device)[:, None]
    channels = torch.arange(d, device=device)
    index = (rows * noise.seq_len + tokens) * d + channels
    bits = _mix(index ^ _mix(noise.key ^ salt))
    return (bits & 0xFFFFFF) >= int(share * 2**24)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014) in wrapping int64 arithmetic."""
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9 as a signed number
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ _shift(x, 31)


def _shift(x: Tensor, n: int) -> Tensor:
    """Logical shift right: torch's own copies the sign."""
    return (x >> n) & ((1 << (64 - n)) - 1)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return x * keep * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return grads[0] * keep * ctx.scale, None, None
