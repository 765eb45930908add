"""The arithmetic of charts."""

import itertools
import statistics

from hypothesis import given
from hypothesis import strategies as st

from megatrain.report.chart import Curve, Frame, Scale, running_median, thinned, ticks

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300)


@given(VALUES, st.integers(1, 40))
def test_thinning_keeps_extremes_ends_in_order_and_is_short(values, buckets):
    points = list(enumerate(values))
    kept = thinned(points, buckets)
    assert len(kept) <= 2 * buckets
    assert kept == sorted(set(kept))
    assert set(kept) <= set(points)
    assert min(v for _, v in kept) == min(values)
    assert max(v for _, v in kept) == max(values)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 8))
def test_ticks_are_few_even_and_inside(low, width, n):
    found = ticks(low, low + width, n)
    assert n / 1.6 - 1 <= len(found) <= 1.6 * n + 1  # the next round number is at most sqrt(5 / 2) away
    assert all(low - 1e-6 * width <= tick <= low + width * (1 + 1e-6) for tick in found)
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert all(abs(gap - gaps[0]) <= 1e-6 * max(1, abs(low), width) for gap in gaps)


def test_ticks_are_round_numbers():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(2.3, 9.1) == [4, 6, 8]


@given(VALUES)
def test_the_running_median_lies_among_its_neighbours(values):
    points = list(enumerate(values))
    smooth = running_median(points, places=50)
    assert len(smooth) <= 50
    assert smooth[0][0] == 0
    half = max(1, len(points) // 40 // 2)
    for i, value in smooth:
        assert value == statistics.median(values[max(0, i - half) : i + half + 1])


def test_the_running_median_ignores_one_spike_and_does_not_lag():
    falling = [(n, 100.0 - n) for n in range(100)]
    falling[50] = (50, 1e6)
    smooth = dict(running_median(falling, places=100))
    assert smooth[50] == 50.0 + 1  # between its neighbours 51 and 49, and itself above both
    assert smooth[70] == 30.0


def test_robust_bounds_leave_out_an_outlier_and_others_do_not():
    curve = Curve("x", [(n, 1.0 + n / 1000) for n in range(200)] + [(200, 1000.0)])
    assert Scale().bounds([curve])[1] > 1000
    assert Scale(robust=True).bounds([curve])[1] < 2
    assert Scale(from_zero=True, robust=True).bounds([curve])[0] == 0


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=5))
def test_bounds_hold_every_value_with_room(values):
    low, high = Scale().bounds([Curve("x", list(enumerate(values)))])
    assert low < min(values)
    assert high > max(values)


def test_a_frame_places_its_corners():
    frame = Frame(100, 50, (0, 10), (0, 1), left=20, right=5, top=3, bottom=7)
    assert (frame.x(0), frame.x(10)) == (20, 95)
    assert (frame.y(0), frame.y(1)) == (43, 3)
