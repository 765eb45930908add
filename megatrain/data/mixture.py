"""Which source a row comes from: a low-discrepancy sequence, so that the shares are exact and not only expected.

Every source earns credit in proportion to its weight with each row that a slot draws; the source with the most credit
gives the row and pays for its tokens. All is in whole numbers, so that it is the same everywhere and for ever. Slot s
starts where one common sequence stands after s rows: a batch then holds s consecutive draws of that sequence, so the
shares are right within each batch as well as over time.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatrain.base.random import seed_of
from megatrain.data.order import hashed

UNIT = 2**32
"""What the shares of all sources add up to; credit is counted in tokens / UNIT."""

Credit = NDArray[np.int64]


def shares(weights: Sequence[float]) -> NDArray[np.int64]:
    """Weights as whole numbers that add up to UNIT: rounded down, what is left goes to the largest remainders."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * UNIT
    found = np.floor(exact).astype(np.int64)
    left = UNIT - int(found.sum())
    found[np.argsort(found - exact, kind="stable")[:left]] += 1
    return found


def draw(credit: Credit, share: NDArray[np.int64], n_tokens: int) -> NDArray[np.int64]:
    """The source of each slot's next row of up to `n_tokens`: the one that would have the most credit.

    Args:
        credit: int64 [slots, sources].
        share: int64 [sources], from `shares`.

    Returns:
        int64 [slots], the first among equals.
    """
    if len(share) == 1:
        return np.zeros(len(credit), dtype=np.int64)
    return (credit + share * n_tokens).argmax(axis=1)


def settle(credit: Credit, share: NDArray[np.int64], picked: NDArray[np.int64], n_tokens: NDArray[np.int64]) -> None:
    """Every source earns its share of the `n_tokens` [slots] that the rows hold, and the `picked` ones pay for them."""
    if len(share) == 1:  # it earns what it pays
        return
    credit += share * n_tokens[:, None]
    credit[np.arange(len(credit)), picked] -= UNIT * n_tokens


def first_credit(share: NDArray[np.int64], seed: int, n_slots: int, n_tokens: int) -> Credit:
    """Credit of each slot before its first row of `n_tokens`: int64 [slots, sources], rows sum to 0."""
    n = len(share)
    phase = (hashed(seed_of(seed, "mixture"), n) >> np.uint64(32)).astype(np.int64)  # up to one row ahead or behind
    phase -= phase.sum() // n
    phase[0] -= phase.sum()
    common = (phase * n_tokens)[None, :]
    credit = np.empty((n_slots, n), dtype=np.int64)
    for slot in range(n_slots):
        credit[slot] = common[0]
        settle(common, share, draw(common, share, n_tokens), np.array([n_tokens]))
    return credit
