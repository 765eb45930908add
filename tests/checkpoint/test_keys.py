"""What may change on resume, and what makes a run another run."""

import pytest

from megatrain.checkpoint.keys import acknowledged, changed_keys

CONFIG = {
    "name": "a",
    "seed": 0,
    "layout": {"tp": 1, "zero": None, "micro_batch": 4},
    "optimizer": {"kind": "adamw", "lr": 1e-3, "betas": [0.9, 0.95], "groups": []},
    "data": {"sources": [{"path": "x", "weight": 1.0}], "workers": 1},
    "train": {"steps": 10, "eval_every": 5},
    "checkpoint": {"every": 5, "keep": {"last": 3}},
    "hooks": [],
}


def changed(**sections) -> dict:
    return CONFIG | {
        name: CONFIG[name] | value if isinstance(value, dict) else value for name, value in sections.items()
    }


def test_nothing_changed_is_nothing():
    assert changed_keys(CONFIG, changed()) == ({}, {})


@pytest.mark.parametrize(
    "sections",
    [
        {"layout": {"tp": 4, "zero": 3}}, {"name": "b"}, {"checkpoint": {"keep": {"last": 9}}},
        {"data": {"sources": [{"path": "moved", "weight": 1.0}]}},
        {"data": {"workers": 8}}, {"train": {"eval_every": 1}}, {"hooks": [{"kind": "stop_at", "step": 3}]},
    ],
)  # fmt: skip
def test_speed_place_and_reporting_are_free(sections):
    free, refused = changed_keys(CONFIG, changed(**sections))
    assert free
    assert not refused


@pytest.mark.parametrize(
    ("sections", "refusals"),
    [
        ({"seed": 1}, {"seed": (0, 1)}),
        ({"train": {"steps": 20}}, {"train.steps": (10, 20)}),
        ({"optimizer": {"betas": [0.9, 0.99]}}, {"optimizer.betas.1": (0.95, 0.99)}),
        ({"optimizer": {"groups": [{"match": "*.norm.*"}]}}, {"optimizer.groups.0.match": (None, "*.norm.*")}),
        ({"data": {"sources": [{"path": "x", "weight": 1.0}, {"path": "y", "weight": 1.0}]}},
         {"data.sources.1.weight": (None, 1.0)}),  # its path alone would be free
        ({"not_known_here": True}, {"not_known_here": (None, True)}),
    ],
)  # fmt: skip
def test_mathematics_is_refused_with_both_values(sections, refusals):
    new = changed(**sections) if "not_known_here" not in sections else CONFIG | sections
    assert changed_keys(CONFIG, new)[1] == refusals


def test_a_section_acknowledges_its_keys_and_no_others():
    assert acknowledged("optimizer.lr", ("optimizer",))
    assert acknowledged("optimizer.lr", ("seed", "optimizer.lr"))
    assert not acknowledged("optimizer.lr", ("optimizer.l", "opt"))
