"""Dropout (Srivastava et al. 2014) whose mask is a function of the element, not of a hidden generator.

Whether an element is dropped is a hash of (seed, step, layer, row of the global batch, token, channel). So the masks of
a step are the same under every layout, micro-batch size and recomputation, which hidden random state can never promise.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatrain.base.random import seed_of
from megatrain.nn.hashing import mix


@dataclass(frozen=True)
class Noise:
    """Names the elements of one micro-batch.

    What changes from step to step and from block to block is a tensor, so that a compiled block is compiled once.
    """

    key: Tensor
    """int64 []: of (seed, step) and, within a block, the block's name."""
    tokens: Tensor
    """int64 [t]: number of each of this rank's tokens of the first row, counted over the rows of the global batch."""
    seq_len: int

    @classmethod
    def of(cls, seed: int, step: int, tokens: Tensor, seq_len: int) -> "Noise":
        """Noise of a step's `tokens` and of those below them in the following rows of `seq_len` tokens."""
        # filled on the device: a copy from the host would make the host wait
        key = torch.full((), seed_of(seed, "dropout", step), dtype=torch.int64, device=tokens.device)
        return cls(key, tokens, seq_len)

    def within(self, name: str) -> "Noise":
        """The noise of the part of the model called `name`, independent of all others."""
        return dataclasses.replace(self, key=mix(self.key ^ seed_of(0, "dropout", name)))


class Dropout(nn.Module):
    """Zero a share of the elements of [b, t, d] and scale up the rest.

    `name` sets this layer apart from others of its block.
    """

    def __init__(self, share: float, name: str):
        super().__init__()
        self.share, self.salt = share, seed_of(0, "dropout", name)

    def forward(self, x: Tensor, noise: Noise | None) -> Tensor:
        if noise is None or self.share == 0:
            return x
        keep = kept(tuple(x.shape), noise, self.salt, self.share)
        return x * keep * (1 / (1 - self.share))


def kept(shape: tuple[int, ...], noise: Noise, salt: int, share: float) -> Tensor:
    """bool [b, t, d]: which elements stay; each with probability 1 - `share`, independently."""
    b, _, d = shape
    device = noise.key.device
    rows = torch.arange(b, device=device)[:, None, None] * noise.seq_len
    index = (rows + noise.tokens[:, None]) * d + torch.arange(d, device=device)
    bits = mix(index ^ mix(noise.key ^ salt))
    return (bits & 0xFFFFFF) >= int(share * 2**24)
