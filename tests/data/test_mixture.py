"""Shares of the sources, in every batch and over time."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data.mixture import UNIT, first_credit, settle, shares
from megatrain.data.mixture import draw as pick


def draw(credit, share, n_tokens):
    picked = pick(credit, share, n_tokens)
    settle(credit, share, picked, np.full(len(credit), n_tokens))
    return picked


WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


@given(WEIGHTS)
def test_shares_add_up_and_are_the_weights_to_one_unit(weights):
    found = shares(weights)
    assert found.sum() == UNIT
    for share, weight in zip(found.tolist(), weights, strict=True):
        assert abs(share - Fraction(weight) / sum(map(Fraction, weights)) * UNIT) < 2


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (7, 2, 1), (1, 1), (0.9, 0.0999, 0.0001)])
def test_shares_are_within_half_a_percentage_point_over_1000_batches_of_8_for_100_seeds(weights):
    share, exact = shares(weights), np.array(weights) / sum(weights)
    for seed in range(100):
        credit = first_credit(share, seed, 8, 128)
        counts = np.zeros(len(weights))
        for _ in range(1000):
            counts += np.bincount(draw(credit, share, 128), minlength=len(weights))
        assert np.abs(counts / counts.sum() - exact).max() < 0.005


@settings(max_examples=30, deadline=None)
@given(WEIGHTS, st.integers(0, 2**31), st.integers(1, 40))
def test_shares_are_right_within_every_batch(weights, seed, n_slots):
    share = shares(weights)
    credit = first_credit(share, seed, n_slots, 64)
    for _ in range(20):
        counts = np.bincount(draw(credit, share, 64), minlength=len(weights))
        assert np.abs(counts - n_slots * share / UNIT).max() < len(weights) + 1


def test_credit_is_conserved_and_bounded():
    share = shares([5, 3, 1, 1])
    credit = first_credit(share, 0, 16, 64)
    for _ in range(5000):
        draw(credit, share, 64)
        assert not credit.sum(axis=1).any()
        assert np.abs(credit).max() < 4 * 64 * UNIT


def test_seeds_draw_in_different_orders():
    share = shares([5, 3, 2])

    def sequence(seed):
        credit = first_credit(share, seed, 1, 64)
        return tuple(int(draw(credit, share, 64)[0]) for _ in range(20))

    assert len({sequence(seed) for seed in range(20)}) > 5
