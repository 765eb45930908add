"""The distribution that tokens are drawn from is the one that temperature, top-k and top-p describe."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatrain.base.random import generator
from megatrain.generate.choose import Choosing, draw, top_k, top_p

LOGITS = st.lists(st.floats(-6, 6, width=32), min_size=1, max_size=6)


def as_set(mask: torch.Tensor) -> set[int]:
    return set(mask.nonzero().flatten().tolist())


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(x - max(logits)) for x in logits]
    return [w / sum(weights) for w in weights]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-48, 48).map(lambda n: n / 16), min_size=1, max_size=6), st.integers(1, 8)
)  # sums are exact
def test_top_k_is_the_subset_of_k_tokens_with_the_largest_sum(logits, k):
    subsets = itertools.combinations(range(len(logits)), min(k, len(logits)))
    best = max(subsets, key=lambda s: math.fsum(logits[i] for i in s))  # of equals the first, which has the lower ids
    found = as_set(top_k(torch.tensor(logits, dtype=torch.float64), k))
    assert len(found) == len(best)
    assert sorted(logits[i] for i in found) == sorted(logits[i] for i in best)
    left_out = set(range(len(logits))) - found
    assert not any(logits[i] == logits[j] and i < j for i in left_out for j in found), "of equals the lower id is kept"


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.floats(0.01, 0.999))
def test_top_p_is_the_smallest_subset_that_has_the_mass(logits, p):
    mass = softmax(logits)
    subsets = [s for n in range(7) for s in itertools.combinations(range(len(mass)), n)]
    masses = {s: math.fsum(mass[i] for i in s) for s in subsets}
    assume(all(abs(m - p) > 1e-9 for m in masses.values()))
    smallest = next(s for s in subsets if masses[s] >= p)
    heaviest = max(masses[s] for s in subsets if len(s) == len(smallest))
    found = as_set(top_p(torch.tensor(logits, dtype=torch.float64), p))
    assert len(found) == len(smallest)
    assert math.fsum(mass[i] for i in found) == pytest.approx(heaviest, abs=1e-12)


def test_top_p_keeps_a_token_even_when_it_alone_has_more_than_p():
    assert as_set(top_p(torch.tensor([9.0, 0.0, 0.0]), 0.1)) == {0}


@settings(max_examples=150, deadline=None)
@given(
    st.lists(LOGITS, min_size=1, max_size=3),
    st.sampled_from([0, 1e-310, 0.3, 1.0, 2.5]),
    st.one_of(st.none(), st.integers(1, 9)),
    st.floats(0.01, 1),
)
def test_probabilities_are_those_of_the_slow_twin(rows, temperature, k, p):
    width = min(map(len, rows))
    rows = [row[:width] for row in rows]
    choosing = Choosing(temperature=temperature, top_k=k, top_p=p)
    found = choosing.probabilities(torch.tensor(rows))
    exact = torch.tensor([choosing.reference(row) for row in rows], dtype=torch.float64)
    borders = [softmax([x / max(temperature, 1e-3) for x in sorted(row, reverse=True)[:k]]) for row in rows]
    assume(all(abs(end - p) > 1e-9 for border in borders for end in itertools.accumulate(border)))
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "choosing",
    [Choosing(), Choosing(temperature=0.5), Choosing(top_k=4), Choosing(top_p=0.7), Choosing(top_k=6, top_p=0.8)],
    ids=str,
)
def test_what_is_drawn_follows_the_distribution(choosing):
    """Pearson's chi-square, far beyond its 99.9% point only for a wrong sampler."""
    g, n = generator(1, "chi-square"), 40_000
    logits = torch.randn(12, generator=g) * 1.5
    chosen = choosing.choose(logits.expand(n, -1), torch.rand(n, generator=g, dtype=torch.float64))
    expected = torch.tensor(choosing.reference(logits.tolist()), dtype=torch.float64) * n
    counts = torch.bincount(chosen, minlength=12).double()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = float(((counts - expected)[possible] ** 2 / expected[possible]).sum())
    freedom = int(possible.sum()) - 1
    wilson_hilferty = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < wilson_hilferty


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1e-30, 0.1, 0.25, 1.0]), min_size=1, max_size=8), st.floats(0, 1, exclude_max=True)
)
def test_a_token_of_probability_0_is_never_drawn(weights, uniform):
    assume(sum(weights) > 0)
    probabilities = torch.tensor([weights], dtype=torch.float64) / sum(weights)
    for u in (uniform, 0.0, 1 - 2**-53):
        assert probabilities[0, draw(probabilities, torch.tensor([u], dtype=torch.float64))] > 0


def test_logits_that_are_not_finite_are_reported_and_not_drawn_from():
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 0.0], [float("inf"), 0.0]])
    for temperature in (0, 1):
        assert Choosing(temperature=temperature).choose(logits, torch.full((3,), 0.9).double()).tolist() == [1, -1, -1]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.2}, "top_p=1.2"),
        ({"top_p": float("nan")}, "top_p=nan"),
    ],
)
def test_an_option_out_of_its_range_is_named(wrong, sentence):
    (problem,) = Choosing(**wrong).problems()
    assert problem.startswith(sentence + ":")
