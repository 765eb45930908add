"""The guard demotes the layer that is off, and it alone; promotes it when that is over; and travels in checkpoints."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from megatrain.engine.api import Precision
from megatrain.engine.guard import Guard, Guarded
from megatrain.models.decoder import Decoder
from megatrain.nn.precision.fp8 import Fp8
from megatrain.nn.precision.select import linears, quantise
from megatrain.optim.kinds.adamw import AdamW
from megatrain.parallel.mesh import Mesh
from megatrain.parallel.shard import initialise
from megatrain.parallel.tensor import TensorParallel
from tests.engine.toy import (
    SEQ_LEN,
    VOCABULARY,
    assembled,
    connected,
    filler,
    floats,
    pieces_of,
    rows_of,
    toy_batch,
    toy_engine,
)
from tests.nn import engine_stand_in
from tests.ranks import run

LAYERS, EVERY, STEPS, LR = 2, 4, 16, 5e-3
MODEL = Decoder(d_model=32, n_layers=LAYERS, n_heads=2, d_ff=64, init_std=0.3)
FP8 = Fp8(min_size=0, keep_first=0, keep_last=0, guard_every=EVERY)
BF16 = {"compute": "bf16", "parameters": "fp32"}
PLANTED, COLUMN, BEGIN, END = "layers.1.feed_forward.down", 5, 5, 10
"""From step BEGIN to before step END one weight of this layer is so large that all others become 0 in FP8."""


def make(*, guarded: bool, tp: int = 1, eight_bits: Any = FP8, micro_batch: int = 4) -> tuple[Any, Any, Mesh]:
    """The engine, its model, the mesh. The input that the planted weight multiplies is always 0."""
    mesh = connected(tp)
    axis = TensorParallel(mesh.axis("tp"), tp > 1)
    model = MODEL.build(n_valid=VOCABULARY, seq_len=SEQ_LEN, tp=axis)
    initialise(model, seed=3)
    products = quantise(model, eight_bits, LAYERS, axis.axis, mesh.axis("row")) if eight_bits else {}
    column = torch.ones(linears(model)[PLANTED].weight.shape[1])
    column[COLUMN] = 0 if mesh.axis("tp").rank == 0 else 1
    linears(model)[PLANTED].register_forward_pre_hook(lambda module, inputs: (inputs[0] * column,))
    optimizer = AdamW(lr=LR, weight_decay=0.0, eps=1e-6)
    engine: Any = toy_engine("plain", 0, mesh, model=model, micro_batch=micro_batch, optimizer=optimizer, **BF16)
    if guarded:
        engine = Guarded(
            engine, Guard(products, EVERY, 0.1, mesh.axis("world"), mesh.axis("dp").rank == 0), torch.device("cpu")
        )
    return engine, model, mesh


def train(
    guarded: bool, tp: int, stop: int | None = None, eight_bits: Any = FP8, micro_batch: int = 4
) -> dict[str, Any]:
    """Losses, and what the guard found; with `stop`, a fresh engine takes over after so many steps."""
    engine, model, mesh = make(guarded=guarded, tp=tp, eight_bits=eight_bits, micro_batch=micro_batch)
    losses, verdicts = [], []
    for step in range(STEPS):
        if step == stop:
            saved, scalars = pieces_of(engine), engine.scalars()
            engine, model, mesh = make(guarded=guarded, tp=tp, eight_bits=eight_bits)
            engine.load(filler(assembled([saved])))
            engine.load_scalars(scalars)
        with torch.no_grad():
            if mesh.axis("tp").rank == 0 and step in (BEGIN, END):
                linears(model)[PLANTED].weight[0, COLUMN] = 1e7 if step == BEGIN else 0.01
        losses.append(floats(engine.step(rows_of(toy_batch(step, 4), mesh), LR))[0])
        if guarded and engine.guard.due(step):
            verdicts.append(engine.guard.latest)
    return {"losses": losses, "verdicts": verdicts}


def test_a_planted_outlier_is_demoted_alone_and_promoted_when_it_goes():
    guarded, free, exact = train(True, 1), train(False, 1), train(False, 1, eight_bits=None)
    before, planted, gone, after = guarded["verdicts"]
    assert (before.step, planted.step, gone.step, after.step) == (0, 4, 8, 12)
    assert set(before.errors) == set(linears(make(guarded=False)[1]))
    assert 0.01 < max(before.errors.values()) < 0.1
    assert not before.in_bf16
    assert not planted.in_bf16
    assert gone.demoted == gone.in_bf16 == [PLANTED]
    assert gone.errors[PLANTED] > 0.9
    assert gone.flushed[PLANTED] > 0.1
    assert max(error for name, error in gone.errors.items() if name != PLANTED) < 0.1
    assert after.promoted == [PLANTED]
    assert not after.in_bf16
    assert abs(before.loss_gap) < 0.05 < abs(gone.loss_gap)
    off = [abs(a - b) for a, b in zip(free["losses"], exact["losses"], strict=True)]
    held = [abs(a - b) for a, b in zip(guarded["losses"], exact["losses"], strict=True)]
    assert 2 * max(held[8:END]) < max(off[8:END]) > 0.2, (held, off)  # what is held is off by eight bits alone


def test_layers_by_transformer_engine_are_watched_alike():
    engine = dataclasses.replace(FP8, backend="transformer_engine", weight_gradient="low")
    with engine_stand_in.installed() as recipes:
        found = train(True, 1, eight_bits=engine)
    assert recipes
    assert [verdict.in_bf16 for verdict in found["verdicts"]] == [[], [], [PLANTED], []]


def test_stopping_and_resuming_changes_nothing():
    straight = train(True, 1)
    for stop in (9, 11):  # demoted; demoted still, and the outlier gone
        resumed = train(True, 1, stop)
        assert resumed["losses"] == straight["losses"]
        assert resumed["verdicts"] == straight["verdicts"]


def test_all_ranks_decide_alike():
    for axes in (1, 2):
        a, b = run(train, 2, True, axes)
        assert a["verdicts"] == b["verdicts"]
        assert [v.in_bf16 for v in a["verdicts"]] == [[], [], [PLANTED], []]


def test_the_micro_batch_does_not_choose_what_is_demoted():
    one, other = (train(True, 1, micro_batch=rows)["verdicts"] for rows in (4, 1))
    assert one[0].errors == other[0].errors
    assert [verdict.in_bf16 for verdict in one] == [verdict.in_bf16 for verdict in other]


def test_looks_are_numbered_by_steps_where_the_data_is_further_on():
    """As after going back to a checkpoint with the data that comes next."""
    engine, _, mesh = make(guarded=True)
    engine.load_scalars(engine.scalars() | {"guarded_steps": 2 * EVERY})
    engine.step(rows_of(toy_batch(2 * EVERY + 3, 4), mesh), LR)
    assert engine.guard.latest.step == 2 * EVERY
    assert engine.scalars()["guarded_steps"] == 2 * EVERY + 1
    engine.step(rows_of(toy_batch(3 * EVERY, 4), mesh), LR)
    assert engine.guard.latest.step == 2 * EVERY


def test_what_is_no_number_is_demoted():
    guard = Guard({}, 1, 0.1, Mesh().axis("world"))
    verdict = guard._decide(0, {"a": [math.nan, 1, 0, 0, 1], "b": [0, 0, 0, 0, 1], "c": [math.inf, 1, 0, 0, 1]}, 0.0)
    assert verdict.demoted == ["a", "c"]


@pytest.mark.parametrize(
    ("precision", "words"),
    [
        ({"compute": "fp16"}, "compute=fp16: it must be fp32 or bf16; fp16 has too small a range"),
        ({"compute": "bf16", "fp8": FP8, "int8": FP8}, "fp8 and int8 are both given"),
        ({"fp8": FP8}, "set compute=bf16"),
        ({"compute": "bf16", "stochastic_rounding": True}, "stochastic_rounding is for parameters=bf16"),
    ],
)
def test_formats_that_cannot_be_are_refused_with_the_reason(precision, words):
    assert words in " ".join(Precision(**precision).problems())


def test_a_card_without_fp8_units_is_named_with_what_would_do():
    assert "this one has 8.0: leave precision.fp8 out" in FP8.card_problem((8, 0))
    assert FP8.card_problem((9, 0)) == FP8.card_problem(None) == ""
