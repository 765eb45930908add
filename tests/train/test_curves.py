"""Curves of number formats beside float32: the good ones stay near, and one that must fail is seen to fail."""

import math
from pathlib import Path

import pytest
import torch

from tools.bench import curves as program
from tools.bench.curves import FAILING, Curve, chosen, differences, table, train

SMALL = (
    "model.d_model=64", "model.n_layers=2", "model.n_heads=4", "model.n_kv_heads=4", "model.d_ff=128",
    "data.seq_len=32", "train.eval_batches=16", "optimizer.kind=muon", "optimizer.lr=2e-2",
)  # fmt: skip
"""Muon makes blocks matter within so few steps."""
GOOD = ["bf16", "fp8-tensorwise", "fp8-rowwise", "fp8-mx", "int8"]


def curves(data: Path, settings: list[str], steps: int, seeds: int, more: tuple[str, ...]) -> list[Curve]:
    torch.set_num_threads(1)
    return [
        train(chosen("precision", setting, str(data), steps, seed, more), setting, steps)
        for seed in range(seeds)
        for setting in ["fp32", *settings, FAILING]
    ]


def test_eight_bits_learn_as_float32_and_gradients_without_scales_do_not(text_data: Path) -> None:
    some = ["fp8-tensorwise-low", "int8-low"]  # the others are in the long test
    found = curves(text_data, some, 60, 1, SMALL)
    for setting in some:
        assert abs(differences(found, setting, "fp32")[0]) < 0.015, table(found)
    assert differences(found, FAILING, "fp32")[0] > 0.03, table(found)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_formats_cost_less_than_half_a_percent_over_a_thousand_steps_of_three_seeds(text_data: Path) -> None:
    found = curves(text_data, GOOD, 1000, 3, ("train.eval_batches=8",))
    print(table(found))
    for setting in GOOD:
        mean, _ = differences(found, setting, "fp32")
        assert abs(mean) < 0.005, table(found)
    mean, half = differences(found, FAILING, "fp32")
    assert mean - half > 0.02, table(found)


def of_optimizers(data: Path, steps: int, seeds: int, more: tuple[str, ...]) -> list[Curve]:
    torch.set_num_threads(1)
    return [
        train(chosen("optimizers", setting, str(data), steps, seed, more), setting, steps)
        for seed in range(seeds)
        for setting in ("adamw", "adamw_8bit")
    ]


def test_moments_in_eight_bits_learn_as_those_in_float32(text_data: Path) -> None:
    found = of_optimizers(text_data, 60, 1, SMALL[:-2])
    assert abs(differences(found, "adamw_8bit", "adamw")[0]) < 0.005, table(found)
    assert found[0].last != found[1].last


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_moments_in_eight_bits_cost_less_than_half_a_percent_over_three_seeds(text_data: Path) -> None:
    found = of_optimizers(text_data, 400, 3, ())
    print(table(found))
    assert abs(differences(found, "adamw_8bit", "adamw")[0]) < 0.005, table(found)


def test_differences_are_paired_by_seed_and_their_interval_is_students():
    found = [Curve("a", seed, [(1, x)]) for seed, x in enumerate((2.0, 4.0, 8.0))]
    found += [Curve("b", seed, [(1, x)]) for seed, x in enumerate((2.02, 4.08, 8.24))]
    mean, half = differences(found, "b", "a")
    assert mean == pytest.approx(0.02)
    assert half == pytest.approx(4.30 * 0.01 / math.sqrt(3))
    assert "+2.00% +- 2.48%" in table(found)


def test_what_a_stopped_call_has_trained_is_not_trained_again(monkeypatch):
    trained = []
    monkeypatch.setattr(program, "chosen", lambda group, setting, data, steps, seed: seed)
    monkeypatch.setattr(program, "train", lambda seed, setting, every: trained.append((setting, seed)) or "new")
    known = [Curve("a", 0, [(2, 5.0), (3, 4.0)]), Curve("b", 0, [(3, 4.0)]), Curve("a", 1, [(2, 5.0), (4, 4.0)])]
    found = list(program.curves("precision", "data", 3, range(2), ["a", "b"], 2, known))
    assert found == [known[0], "new", "new", "new"]
    assert trained == [("b", 0), ("a", 1), ("b", 1)]
