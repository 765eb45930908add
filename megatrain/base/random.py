"""Named randomness: each random thing is a pure function of (seed, its name), never of hidden global state.

So a weight does not depend on which weights were drawn before it, nor on the layout of the run.
"""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def seed_of(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the thing called `names`, independent of every other name.

    >>> seed_of(0, "layers.0.norm.weight") != seed_of(0, "layers.1.norm.weight")
    True
    """
    text = "\x1f".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *names: str | int) -> "torch.Generator":
    """A CPU generator that yields the same numbers on every machine and layout."""
    import torch

    return torch.Generator().manual_seed(seed_of(seed, *names))
