"""Collectives of a real step, counted, against the closed forms; and none at all on axes of size 1."""

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatrain.audit.communication import Communication, group_names
from megatrain.base.device import Device
from megatrain.engine.api import ENGINE, Parts, Precision
from megatrain.engine.layout import Layout, resolve_engine
from megatrain.engine.traffic import StepShape, step_traffic
from megatrain.models.decoder import Decoder
from megatrain.models.recompute import recompute
from megatrain.models.stages import Stages
from megatrain.nn.attention.sliding_window import SlidingWindow
from megatrain.nn.batch import Batch
from megatrain.nn.norm.layer_norm import LayerNorm
from megatrain.nn.position.learned import Learned
from megatrain.optim.kinds.adamw import AdamW
from megatrain.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatrain.parallel.mesh import Axis
from megatrain.parallel.product import linear
from megatrain.parallel.shard import initialise, normal
from megatrain.parallel.tensor import TensorParallel
from tests.contract import batch, leaf
from tests.ranks import run

N_VALID, SEQ_LEN, ROWS = 37, 16, 4
LLAMA = Decoder(d_model=16, n_layers=2, n_heads=8, n_kv_heads=2, d_ff=24, vocab_size=40)
GPT = dataclasses.replace(LLAMA, n_kv_heads=4, position=Learned(), norm=LayerNorm(), tie_embeddings=False)
DEEP = dataclasses.replace(LLAMA, n_layers=4)
WIDE = dataclasses.replace(LLAMA, d_model=512, d_ff=600)  # weights that DeepSpeed cuts: of 100,000 elements and more
POST = dataclasses.replace(GPT, norm=LayerNorm(placement="post"))
WINDOW = dataclasses.replace(LLAMA, attention=SlidingWindow(window=3, qk_norm=True), dropout=0.1)


def rows_of_rank(given: Batch, layout: Layout, mesh: Any) -> Batch:
    dp = mesh.axis("dp")
    mine = list(given.split(given.rows // dp.size))[dp.rank]
    return mine.context_part(layout.context(mesh).columns(SEQ_LEN))


def counted(cases: list[tuple[Decoder, Layout]], bf16: bool = False) -> list[tuple[dict, dict]]:
    """(counted, by formula) of each case; the ranks of one start take them one after another."""
    precision, element = (Precision(compute="bf16", parameters="bf16"), 2) if bf16 else (Precision(), 4)
    found = []
    for model, layout in cases:
        mesh = layout.mesh(dist.get_world_size()).at(dist.get_rank()).connect()
        tp = TensorParallel(mesh.axis("tp"), layout.cuts_sequence)
        build = partial(model.build, n_valid=N_VALID, seq_len=SEQ_LEN, tp=tp, cp=layout.context(mesh))
        plan = layout.pipeline(model.costs(N_VALID, SEQ_LEN))
        built: Any = build() if plan is None else Stages.build(plan.spans(mesh.axis("pp").rank), build)
        initialise(built, seed=0)
        recompute(built.layers, layout.recompute)
        resolved = resolve_engine(layout, mesh.size)
        parts = Parts(built, AdamW(lr=1e-3), mesh, Device("cpu"), precision, layout.micro_batch, resolved.zero, plan)
        engine = ENGINE[resolved.engine]().build(parts)
        given = rows_of_rank(batch(*[(5, 11)] * ROWS, vocab_size=N_VALID), layout, mesh)
        for _ in range(2):  # DeepSpeed looks at the first ones to know what to gather ahead
            engine.step(given, 1e-3)
        with Communication(group_names(mesh.groups)) as seen:
            engine.step(given, 1e-3)
        engine.close()
        shape = StepShape(model, N_VALID, SEQ_LEN, layout, mesh, ROWS, element)
        found.append((dict(seen.traffic), dict(step_traffic(shape))))
    return found


TWO = [
    (GPT, Layout(tp=2)),
    (GPT, Layout(tp=2, sequence_parallel=False)),
    (LLAMA, Layout(cp=2, engine="plain")),
    (LLAMA, Layout(cp=2, cp_kind="ulysses", engine="plain", micro_batch=2)),
    (GPT, Layout(engine="plain")),
    (LLAMA, Layout(zero=1)),
    (LLAMA, Layout(zero=2)),
    (LLAMA, Layout(zero=3)),
    (WIDE, Layout(zero=3, micro_batch=2)),
    (LLAMA, Layout(engine="fsdp2", zero=2)),
    (LLAMA, Layout(engine="fsdp2", zero=3, micro_batch=2)),
    (LLAMA, Layout(engine="deepspeed", zero=0)),
    (GPT, Layout(tp=2, recompute="selective")),
    (GPT, Layout(tp=2, recompute="elementwise")),
    (LLAMA, Layout(tp=2, recompute="full")),
    (GPT, Layout(tp=2, sequence_parallel=False, recompute="1")),
    (POST, Layout(tp=2, recompute="full")),
    (LLAMA, Layout(cp=2, engine="plain", recompute="selective")),
    (LLAMA, Layout(cp=2, cp_kind="ulysses", engine="plain", micro_batch=2, recompute="full")),
]
FOUR = [
    (LLAMA, Layout(tp=4)),
    (WINDOW, Layout(tp=2, cp=2, engine="plain")),
    (WINDOW, Layout(cp=4, engine="plain", micro_batch=2)),
    (LLAMA, Layout(tp=2, dp=2, zero=2)),
    (GPT, Layout(tp=2, dp=2, zero=3)),
    (LLAMA, Layout(tp=2, dp=2, engine="fsdp2", zero=3)),
    (GPT, Layout(tp=2, dp=2, engine="plain")),
    (DEEP, Layout(tp=2, pp=2, engine="plain")),
    (DEEP, Layout(tp=2, sequence_parallel=False, pp=2, schedule="interleaved", engine="plain")),
    (DEEP, Layout(cp=2, pp=2, schedule="zbv", engine="plain", micro_batch=2)),
    (DEEP, Layout(dp=2, pp=2, schedule="gpipe", engine="fsdp2", zero=2)),
    (dataclasses.replace(DEEP, tie_embeddings=False), Layout(dp=2, pp=2, schedule="zbv", engine="fsdp2", zero=2)),
    (WINDOW, Layout(tp=2, cp=2, engine="plain", recompute="full")),
    (DEEP, Layout(tp=2, pp=2, schedule="zbv", engine="plain", recompute="1,3")),
    (DEEP, Layout(dp=2, pp=2, engine="deepspeed", zero=0)),
    (DEEP, Layout(dp=2, pp=2, schedule="zbv", engine="deepspeed", zero=1)),
    (DEEP, Layout(dp=2, pp=2, schedule="interleaved", engine="deepspeed", zero=2)),
]


@pytest.mark.parametrize(("n", "cases"), [(2, TWO), (4, FOUR)], ids=["2 ranks", "4 ranks"])
def test_counted_collectives_are_those_of_the_closed_forms(n, cases):
    for rank in run(counted, n, cases):
        for (model, layout), (seen, formula) in zip(cases, rank, strict=True):
            assert seen == formula, f"{layout}, {model.n_kv_heads} key-value heads"


BF16_TWO = [
    # a CPU without bf16 products keeps what sequence parallelism gathers, and a ring sends float32 there
    (GPT, Layout(tp=2, sequence_parallel=False)),
    (LLAMA, Layout(engine="plain")),
    (LLAMA, Layout(cp=2, cp_kind="ulysses", engine="plain")),
    (LLAMA, Layout(zero=1)),
    (LLAMA, Layout(zero=2)),
    (WIDE, Layout(zero=3, micro_batch=2)),
    (LLAMA, Layout(engine="fsdp2", zero=2)),
    (LLAMA, Layout(engine="fsdp2", zero=3, micro_batch=2)),
]
BF16_FOUR = [
    (DEEP, Layout(tp=2, pp=2, schedule="zbv", engine="plain")),
    (DEEP, Layout(dp=2, pp=2, schedule="zbv", engine="deepspeed", zero=1)),
    (DEEP, Layout(dp=2, pp=2, schedule="interleaved", engine="deepspeed", zero=2)),
    (dataclasses.replace(DEEP, tie_embeddings=False), Layout(dp=2, pp=2, schedule="zbv", engine="fsdp2", zero=2)),
]


@pytest.mark.parametrize(("n", "cases"), [(2, BF16_TWO), (4, BF16_FOUR)], ids=["2 ranks", "4 ranks"])
def test_in_bf16_activations_and_parameters_are_sent_in_two_bytes_and_gradients_in_four(n, cases):
    for rank in run(counted, n, cases, True):
        for (_, layout), (seen, formula) in zip(cases, rank, strict=True):
            assert seen == formula, layout


def test_with_sequence_parallelism_a_layer_has_two_gathers_and_two_scatters_forward():
    """The formula by hand, for one layer: the rest is the head's and the embedding's."""
    mesh = Layout(tp=2).mesh(2)
    one, two = (
        step_traffic(StepShape(dataclasses.replace(GPT, n_layers=n), N_VALID, SEQ_LEN, Layout(tp=2), mesh, 1))
        for n in (1, 2)
    )
    assert two["tp", "all_gather"].calls - one["tp", "all_gather"].calls == 2 + 4
    assert two["tp", "reduce_scatter"].calls - one["tp", "reduce_scatter"].calls == 2 + 2
    assert one["tp", "all_gather"].bytes == 8 * SEQ_LEN * GPT.d_model * 4


# ------------------------------------------------------------------------------------------------ axes of size 1


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names.append(str(op))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
@pytest.mark.parametrize("bias", [True, False])
def test_alone_a_cut_layer_calls_the_operators_of_a_plain_linear(kind, bias):
    layer = kind(8, 12, TensorParallel(Axis("tp"), sequence=True), init=normal(0.1), bias=bias)
    initialise(layer, seed=0)
    x = leaf(2, 4, 8)
    seen = []
    for product in (layer, lambda x: linear(x, layer.weight, layer.bias)):
        with Operators() as operators:
            product(x).sum().backward()
        seen.append(operators.names)
        layer.zero_grad()
        x.grad = None
    assert seen[0] == seen[1]


@pytest.mark.parametrize("cp_kind", ["ring", "ulysses"])
def test_alone_a_step_calls_no_collective(cp_kind):
    layout = Layout(cp_kind=cp_kind, sequence_parallel=True)
    mesh = layout.mesh(1)
    model = WINDOW.build(n_valid=N_VALID, seq_len=SEQ_LEN, tp=TensorParallel(mesh.axis("tp")), cp=layout.context(mesh))
    initialise(model, seed=0)
    with Operators() as operators:
        loss, _ = model(rows_of_rank(batch((5, 11), vocab_size=N_VALID), layout, mesh))
        loss.backward()
    assert not [name for name in operators.names if "c10d" in name]
    assert step_traffic(StepShape(WINDOW, N_VALID, SEQ_LEN, layout, mesh, 1)) == {}
    assert torch.isfinite(loss)
