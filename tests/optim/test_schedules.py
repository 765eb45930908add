"""Schedules are pure functions of the step, so a test is a line of numbers."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatrain.config.build import build, plain
from megatrain.config.source import Node
from megatrain.optim.schedule import SCHEDULE
from megatrain.optim.schedules.constant import Constant
from megatrain.optim.schedules.cosine import Cosine
from megatrain.optim.schedules.inverse_sqrt import InverseSqrt
from megatrain.optim.schedules.linear import Linear
from megatrain.optim.schedules.wsd import WarmupStableDecay

MEMBERS = [
    Constant(warmup=10),
    Cosine(warmup=10, floor=0.1),
    Cosine(floor=0.0),
    InverseSqrt(warmup=10, floor=0.05),
    Linear(warmup=10, floor=0.2),
    WarmupStableDecay(warmup=10, decay=20, floor=0.1),
    WarmupStableDecay(warmup=10, decay=0, shape="linear"),
]


def values(schedule, steps, total=100):
    return [schedule.lr_factor(step, total) for step in steps]


def test_every_registered_schedule_is_tested_here():
    assert {m.kind for m in MEMBERS} == set(SCHEDULE.kinds())


@pytest.mark.parametrize("schedule", [m for m in MEMBERS if m.warmup], ids=str)
def test_warm_up_is_linear_from_the_first_step_and_ends_at_the_peak(schedule):
    assert values(schedule, [1, 5, 10]) == [0.1, 0.5, 1.0]


def test_cosine_equals_its_closed_form_and_ends_at_the_floor():
    schedule = Cosine(warmup=20, floor=0.1)
    assert values(schedule, [20, 60, 100]) == pytest.approx([1.0, 0.55, 0.1], abs=1e-15)
    assert schedule.lr_factor(40, 100) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert schedule.lr_factor(100, 100) == 0.1


def test_linear_equals_its_closed_form():
    assert values(Linear(warmup=20, floor=0.2), [20, 40, 60, 100]) == pytest.approx([1.0, 0.8, 0.6, 0.2])


def test_inverse_sqrt_halves_when_the_step_is_four_times_the_warm_up_and_does_not_know_the_end():
    schedule = InverseSqrt(warmup=25, floor=0.05)
    assert values(schedule, [25, 100, 10_000, 10**9], total=1) == [1.0, 0.5, 0.05, 0.05]


@pytest.mark.parametrize(("shape", "halfway"), [("linear", 0.5), ("one_minus_sqrt", 1 - math.sqrt(0.5))])
def test_wsd_is_stable_until_its_last_steps(shape, halfway):
    schedule = WarmupStableDecay(warmup=10, decay=20, shape=shape)
    assert values(schedule, [10, 50, 80, 90, 100]) == pytest.approx([1.0, 1.0, 1.0, halfway, 0.0])


def test_wsd_runs_of_two_lengths_share_their_trunk():
    schedule = WarmupStableDecay(warmup=10, decay=20)
    assert values(schedule, range(1, 81), total=100) == values(schedule, range(1, 81), total=300)


@given(st.sampled_from(MEMBERS), st.integers(1, 400), st.integers(30, 300))
def test_a_factor_is_a_fraction_and_never_rises_after_the_warm_up(schedule, step, total):
    now, later = schedule.lr_factor(step, total), schedule.lr_factor(step + 1, total)
    assert 0 <= now <= 1
    assert step < schedule.warmup or later <= now
    assert schedule.lr_factor(total + 7, total) == schedule.lr_factor(total, total) or schedule.kind == "inverse_sqrt"


@pytest.mark.parametrize("schedule", MEMBERS, ids=str)
def test_a_schedule_comes_back_from_its_own_plain_values(schedule):
    values = {key: Node(value, "test") for key, value in plain(schedule).items() if key != "kind"}
    assert build(type(schedule), Node(values, "test"))[0] == schedule


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (Cosine(warmup=-1), "warmup=-1"),
        (Linear(floor=1.5), "floor=1.5"),
        (InverseSqrt(warmup=0), "at least 1 step"),
        (WarmupStableDecay(decay=-1), "decay=-1"),
    ],
)
def test_fields_out_of_range_are_refused_by_name(schedule, words):
    assert any(words in sentence for sentence in schedule.problems())


def test_a_schedule_that_does_not_fit_the_run_says_so():
    assert "warmup=100" in Cosine(warmup=100).unsupported_reasons(100)[0]
    assert Cosine(warmup=99).unsupported_reasons(100) == []
    assert "their sum at most 100" in WarmupStableDecay(warmup=60, decay=41).unsupported_reasons(100)[0]
    assert WarmupStableDecay(warmup=60, decay=40).unsupported_reasons(100) == []
