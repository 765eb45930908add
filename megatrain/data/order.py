"""The one order of the data: seeded permutations that are the same on every machine and for every numpy.

A permutation is computed, not drawn from a generator with a state: nothing has to be replayed to find what comes at a
position, and nothing but the seed has to be saved.
"""

import numpy as np
from numpy.typing import NDArray

from megatrain.base.random import seed_of


def hashed(key: int, n: int) -> NDArray[np.uint64]:
    """`n` well mixed 64-bit numbers that depend on `key` and their index alone.

    Paper: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 16 (SplitMix64).
    """
    golden = 0x9E3779B97F4A7C15
    with np.errstate(over="ignore"):
        x = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(golden) + np.uint64(key)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def permutation(n: int, seed: int, *names: str | int) -> NDArray[np.int64]:
    """0 .. n-1 in the order that (seed, names) give.

    Sorts hashes with the index in their low bits: no two are equal, so any sorting algorithm gives this order.
    """
    bits = np.uint64(max(1, n - 1).bit_length())
    keys = (hashed(seed_of(seed, *names), n) >> bits << bits) | np.arange(n, dtype=np.uint64)
    keys.sort()
    return (keys & np.uint64((1 << int(bits)) - 1)).astype(np.int64)
