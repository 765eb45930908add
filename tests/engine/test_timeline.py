"""The drawn timeline is that of torch's own schedules, and its bubble is the one of the closed form."""

from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from megatrain.engine.schedules import SCHEDULES, PipelinePlan
from megatrain.engine.timeline import as_text, draw, stage_units, timeline
from megatrain.engine.torch_pipelining import actions_of

CHUNKED = [
    *((name, schedule.default_virtual) for name, schedule in SCHEDULES.items()),
    ("interleaved_zero_bubble", 1),
]


def plan(name: str, p: int, v: int) -> PipelinePlan:
    return PipelinePlan(SCHEDULES[name], p, v, (1,) * (p * v))


@pytest.mark.parametrize(("name", "v"), CHUNKED)
def test_the_bubble_share_of_every_rank_is_the_closed_form(name: str, v: int) -> None:
    schedule = SCHEDULES[name]
    drawn = {}
    for p in range(2, 9):
        for m in range(p, 4 * p + 1):
            if not schedule.problems(name, p, m, v):
                drawn[p, m] = timeline(plan(name, p, v), m).bubble_shares()
    assert drawn == {(p, m): [schedule.bubble_share(p, m, v)] * p for p, m in drawn}
    assert {p for p, _ in drawn} == set(range(2, 9))
    assert len(drawn) > 60


def test_closed_forms_that_papers_give() -> None:
    assert SCHEDULES["1f1b"].bubble_share(4, 8, 1) == Fraction(3, 8 + 3)
    assert SCHEDULES["interleaved"].bubble_share(4, 8, 2) == Fraction(3, 2 * 8 + 3)
    assert SCHEDULES["zbv"].bubble_share(4, 8, 2) == Fraction(3, 6 * 8 + 3)


@pytest.mark.parametrize(("name", "v"), CHUNKED)
def test_every_stage_runs_every_micro_batch_once_where_the_plan_puts_it(name: str, v: int) -> None:
    p, m = 3, 6
    found: Counter[tuple[str, int, int]] = Counter()
    for rank, actions in enumerate(actions_of(plan(name, p, v), m)):
        assert {a.stage for a in actions} == set(plan(name, p, v).stages_of(rank))
        for a in actions:
            found.update((part, a.stage, a.micro_batch) for part in ("IW" if a.kind == "B" else a.kind))
    assert found == Counter((k, s, i) for k in "FIW" for s in range(p * v) for i in range(m))


def test_a_costly_stage_makes_the_others_wait() -> None:
    even = timeline(plan("1f1b", 2, 1), 8)
    skewed = timeline(plan("1f1b", 2, 1), 8, costs=(1.0, 3.0))
    assert stage_units((1.0, 3.0), 2) == [Fraction(1, 2), Fraction(3, 2)]
    assert skewed.length > even.length
    cheap, dear = skewed.bubble_shares()
    assert cheap > Fraction(1, 2) > dear


def test_text_shows_each_rank_and_its_idle_share() -> None:
    text = as_text(timeline(plan("1f1b", 2, 1), 3))
    assert text.splitlines()[:2] == [
        "rank 0 F0 F1 .  .  B0 -  F2 B1 -  .  B2 -  ",
        "rank 1 .  F0 B0 -  F1 B1 -  F2 B2 -  .  .  ",
    ]
    assert "rank 1 idle  25.0%" in text


def test_text_of_a_long_step_is_cut_into_blocks_that_fit() -> None:
    text = as_text(timeline(plan("zbv", 4, 2), 8), columns=60)
    assert max(map(len, text.splitlines()[:-6])) <= 60
    assert text.count("rank 3 ") > 3
    assert "f0" in text
    assert "gradients of weights" in text


def test_a_picture_is_a_png(tmp_path: Path) -> None:
    draw(timeline(plan("dualpipev", 2, 2), 4), "dualpipev", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
