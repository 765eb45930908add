"""Seeded permutations."""

import numpy as np
import pytest

from megatrain.data.order import hashed, permutation


@pytest.mark.parametrize("n", [0, 1, 2, 3, 255, 256, 257, 10_000])
def test_it_is_a_permutation(n):
    assert sorted(permutation(n, 3, "shards", 1).tolist()) == list(range(n))


def test_the_order_is_the_same_for_ever():
    """A run that is resumed by a later version must find the same order: these numbers may never change."""
    assert permutation(12, 0, "documents", "f", 0, 1).tolist() == [3, 2, 10, 7, 8, 6, 9, 1, 11, 5, 4, 0]
    assert hashed(0, 2).tolist() == [16294208416658607535, 7960286522194355700]  # the published test vector


def test_every_name_has_an_order_of_its_own():
    orders = {tuple(permutation(50, seed, name, epoch)) for seed in (0, 1) for name in "ab" for epoch in range(5)}
    assert len(orders) == 20


def test_every_place_is_equally_likely():
    n, trials = 8, 4000
    counts = np.zeros((n, n))
    for trial in range(trials):
        counts[np.arange(n), permutation(n, trial, "x")] += 1
    expected = trials / n
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 95  # 49 degrees of freedom: 99.99% of fair shuffles are below
