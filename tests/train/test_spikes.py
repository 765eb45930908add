"""A spike is told from noise, and what is written about it is true."""

import math
import random
from pathlib import Path

import pytest

from megatrain.data.trace import trace
from megatrain.train.config import read_run
from megatrain.train.examine import layer_norms
from megatrain.train.hook import Handle
from megatrain.train.hooks.spikes import Spikes, robust_score
from megatrain.train.run import train
from tests.ranks import run as run_ranks
from tests.train.small import events, metrics, on_ranks, write_run


def told(losses: list[float], tmp_path: Path, **fields) -> list[dict]:
    found: list[dict] = []
    handle = Handle(
        folder=tmp_path, rank=0, world=1, total_steps=len(losses), first_step=1,
        note=lambda kind, **facts: found.append({"kind": kind, **facts}), examine=lambda: {"documents": ["a"]},
    )  # fmt: skip
    hook = Spikes(**fields).build(handle)
    for step, loss in enumerate(losses, 1):
        hook.after_step({"step": step, "loss": loss, "grad_norm": 1.0})
    return found


def falling(n: int) -> list[float]:
    noise = random.Random(0)
    return [3 + 2 * math.exp(-k / 60) + noise.gauss(0, 0.03) for k in range(n)]


def test_a_loss_that_falls_with_noise_has_no_spike(tmp_path):
    assert told(falling(400), tmp_path) == []


@pytest.mark.parametrize("loss", [4.2, math.nan, math.inf])
def test_planted_spikes_are_found_at_their_steps_and_no_others(loss, tmp_path):
    losses = falling(400)
    for step in (150, 151, 300):
        losses[step - 1] = loss
    found = told(losses, tmp_path)
    assert [event["at_step"] for event in found] == [150, 151, 300]
    assert all(event["kind"] == "spike" and event["documents"] == ["a"] for event in found)


def test_a_score_is_counted_in_deviations_that_outliers_do_not_move():
    noise = random.Random(1)
    before = [noise.gauss(2, 0.1) for _ in range(1000)] + [50.0] * 20
    assert robust_score(2.5, before) == pytest.approx(5, rel=0.15)
    assert robust_score(2.0, [2.0] * 50) == 0
    assert robust_score(2.001, [2.0] * 50) == pytest.approx(0.5)


def test_norms_of_parameters_add_up_to_those_of_blocks():
    mine = {"layers.0.a": 9.0, "layers.0.b": 7.0, "layers.11.a": 4.0, "norm.weight": 1.0}
    assert layer_norms([mine, {"layers.0.a": 9.0}]) == {"layers.0": 5.0, "layers.11": 2.0, "norm.weight": 1.0}


@pytest.mark.parametrize("ranks", [1, 2], ids=["plain", "zero-1"])
def test_documents_norms_and_activations_are_those_of_the_step(ranks: int, tmp_path: Path, text_data: Path) -> None:
    hooks = [{"kind": "spikes", "after": 2, "window": 3, "threshold": 1e-6}]  # any rise is a spike here
    path = write_run(tmp_path, text_data, hooks=hooks, train__eval_every=0, optimizer__lr=0.3)
    run = read_run(path).run
    if ranks == 1:
        train(run)
    else:
        run_ranks(on_ranks, ranks, str(path))
    found = events(run.folder, "spike")
    assert found, "no loss rose in the whole run"
    norms = {line["step"]: line["grad_norm"] for line in metrics(run.folder)}
    traced = {line["step"] + 1: line for line in trace(run.data, seed=run.seed, global_batch=8, start=0, stop=12)}
    for event in found:
        step = event["at_step"]
        assert event["documents"] == traced[step]["documents"]
        total = math.sqrt(sum(norm**2 for norm in event["gradient_norms"].values()))
        assert total == pytest.approx(norms[step], rel=1e-4)
        assert set(event["activations"]) == {"layers.0", "layers.1"} < set(event["gradient_norms"])
        assert all(0 < x < 1e5 for x in event["activations"].values())
