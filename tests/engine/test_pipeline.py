"""A model cut into pipeline stages trains as in one process: every schedule, under every engine."""

import dataclasses
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.base.device import Device
from megatrain.engine.api import ENGINE, Engine, Parts, Precision
from megatrain.engine.kinds.deepspeed import DeepSpeed
from megatrain.engine.layout import Layout
from megatrain.engine.schedules import SCHEDULES
from megatrain.models.decoder import Decoder
from megatrain.models.recompute import recompute
from megatrain.models.stages import Stages, spans_of
from megatrain.nn.batch import Batch
from megatrain.optim.optimizer import Group
from megatrain.parallel.mesh import Mesh
from megatrain.parallel.shard import initialise
from megatrain.parallel.tensor import TensorParallel
from tests.engine.toy import (
    OPTIMIZER,
    SEQ_LEN,
    VOCABULARY,
    Pieces,
    assembled,
    floats,
    pieces_of,
    toy_batch,
)
from tests.ranks import run

ROWS, STEPS, LR, SEED = 8, 3, 1e-2, 3
MODEL = Decoder(d_model=16, n_layers=5, n_heads=4, n_kv_heads=2, d_ff=24, dropout=0.1)
"""Five layers: stages of unequal length."""


@dataclass(frozen=True)
class Case:
    """One layout. The ranks that pp and tp leave are data-parallel."""

    schedule: str
    engine: str = "plain"
    zero: int = 0
    pp: int = 2
    tp: int = 1
    cp: int = 1
    dp: int = 1
    tied: bool = True
    micro_batch: int = 1
    recompute: str = "none"
    compiled: str | None = None
    """The compiler's backend."""
    stages: tuple[int, ...] | None = None
    virtual: int | None = None
    parameters: str = "fp32"
    optimizer: Any = OPTIMIZER
    steps: int = STEPS

    @property
    def ranks(self) -> int:
        return self.pp * self.tp * self.cp * self.dp

    def __str__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)
            if f.name not in ("schedule", "engine", "zero") and getattr(self, f.name) != f.default
        ]
        return "-".join([self.schedule, f"{self.engine}{self.zero}", *changed])

    def layout(self) -> Layout:
        return Layout(
            pp=self.pp, cp=self.cp, schedule=self.schedule, virtual=self.virtual, stages=self.stages or "auto"
        )

    def mesh(self) -> Mesh:
        if not dist.is_initialized():
            return Mesh()
        return Mesh.of(pp=self.pp, dp=self.dp, cp=self.cp, tp=self.tp).at(dist.get_rank()).connect()

    def rows(self, batch: Batch, mesh: Mesh) -> Batch:
        """What this rank computes of a global batch."""
        mine = list(batch.split(batch.rows // self.dp))[mesh.axis("dp").rank]
        return mine.context_part(self.layout().context(mesh).columns(SEQ_LEN))

    def engine_of(self, mesh: Mesh, change: Callable[[Any], None] = lambda model: None) -> Engine:
        tp = TensorParallel(mesh.axis("tp"), self.tp > 1)
        decoder = dataclasses.replace(MODEL, tie_embeddings=self.tied)
        layout = self.layout()
        facts: dict[str, Any] = {"n_valid": VOCABULARY, "seq_len": SEQ_LEN, "tp": tp, "cp": layout.context(mesh)}
        plan = layout.pipeline(decoder.costs(VOCABULARY, SEQ_LEN))
        if plan is None:
            model: Any = decoder.build(**facts)
        else:
            stages: dict[int, Any] = {}
            for number in plan.stages_of(mesh.axis("pp").rank):
                stages[number] = decoder.build(span=spans_of(plan.layers)[number], first=stages.get(0), **facts)
            model = Stages(stages)
        initialise(model, SEED)
        change(model)
        recompute(model.layers, self.recompute)
        if self.compiled:
            model.compile_blocks(self.compiled)
        precision = Precision(compute="bf16" if self.parameters == "bf16" else "fp32", parameters=self.parameters)
        parts = Parts(model, self.optimizer, mesh, Device("cpu"), precision, self.micro_batch, self.zero, plan)
        # so small parameters would be kept whole under ZeRO-3
        choice = DeepSpeed(persistent_below=0) if self.engine == "deepspeed" else ENGINE[self.engine]()
        return choice.build(parts)


ONE = Case("gpipe", pp=1, micro_batch=ROWS)


def batch_of(step: int) -> Batch:
    """Rows with a border between two documents, another one in each row."""
    batch = toy_batch(step, ROWS)
    border = torch.arange(ROWS)[:, None] % (SEQ_LEN - 1) + 1
    column = torch.arange(SEQ_LEN).expand(ROWS, -1)
    second = column >= border
    positions = torch.where(second, column - border, column)
    return dataclasses.replace(batch, positions=positions, documents=second.to(torch.int32), most_documents=2)


@dataclass
class Story:
    """What one rank saw of some steps."""

    start: Pieces
    reports: list[tuple[float, float, float, float]]
    first: Pieces
    """The state after one step: its first moment is a tenth of the clipped gradient."""
    end: Pieces
    held_out: tuple[float, float]


def tell(case: Case) -> Story:
    mesh = case.mesh()
    engine = case.engine_of(mesh)
    start = pieces_of(engine)
    reports, first = [], []
    for k in range(case.steps):
        reports.append(floats(engine.step(case.rows(batch_of(k), mesh), LR)))
        if k == 0:
            first = pieces_of(engine)
    held_out = engine.evaluate(case.rows(batch_of(99), mesh))
    story = Story(start, reports, first, pieces_of(engine), (float(held_out[0]), float(held_out[1])))
    engine.close()
    return story


def tell_all(cases: list[Case]) -> list[Story]:
    return [tell(case) for case in cases]


@cache
def one(tied: bool, steps: int, optimizer: Any = OPTIMIZER) -> Story:
    return tell(dataclasses.replace(ONE, tied=tied, steps=steps, optimizer=optimizer))


def assert_equal(case: Case, stories: list[Story]) -> None:
    expected = one(case.tied, case.steps, case.optimizer)
    for story in stories:
        assert [r[:2] for r in story.reports] == [pytest.approx(r[:2], rel=1e-5) for r in expected.reports], case
        assert [r[2] for r in story.reports] == [pytest.approx(r[2], rel=1e-5) for r in expected.reports], case
        assert story.held_out == pytest.approx(expected.held_out, rel=1e-5), case
    start, first, end = (assembled([getattr(s, part) for s in stories]) for part in ("start", "first", "end"))
    for key, tensor in assembled([expected.start]).items():
        assert torch.equal(start[key], tensor), f"{case}: {key} does not start from the same bits"
    for key, tensor in assembled([expected.first]).items():
        assert distance(first[key], tensor) < 1e-4, f"{case}: {key} after one step"
    for key, tensor in assembled([expected.end]).items():
        assert distance(end[key], tensor) < 1e-4, f"{case}: {key} at the end"


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


TWO_RANKS = [
    *(Case(schedule) for schedule in SCHEDULES),
    Case("gpipe", tied=False, stages=(1, 4), micro_batch=4),
    Case("1f1b", recompute="full", micro_batch=2),
    Case("zbv", tied=False, recompute="selective"),
]

FOUR_RANKS = [
    Case("1f1b", pp=4),  # of the middle ranks none has the embedding
    Case("interleaved_zero_bubble", pp=4, virtual=1, tied=False),
    Case("zbv", tp=2),
    Case("dualpipev", dp=2, tied=False),
    Case("interleaved", cp=2),
    Case("gpipe", "fsdp2", 2, dp=2),
    Case("1f1b", "fsdp2", 2, tp=2),
    Case("interleaved", "fsdp2", 2, dp=2, tied=False),
    Case("looped_bfs", "fsdp2", 2, dp=2),
    Case("interleaved_zero_bubble", "fsdp2", 2, dp=2),
    Case("zbv", "fsdp2", 2, dp=2, tied=False),
    Case("dualpipev", "fsdp2", 2, dp=2, tied=False),
]


EVERY_PAIR = [
    Case(schedule, engine, zero, steps=10, tied=(engine, SCHEDULES[schedule].placement) != ("fsdp2", "v"), **axis)
    for schedule in SCHEDULES
    for engine, zero in (("plain", 0), ("fsdp2", 2))
    for axis in ({"tp": 2}, {"cp": 2, "recompute": "full"}, {"dp": 2})
]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "cases",
    [TWO_RANKS, FOUR_RANKS, pytest.param(EVERY_PAIR, marks=pytest.mark.slow)],
    ids=["2 ranks", "4 ranks", "every pair"],
)
def test_pipelines_equal_one_process(cases):
    for case, *stories in zip(cases, *run(tell_all, cases[0].ranks, cases, timeout=1500), strict=True):
        assert_equal(case, stories)


OF_ONE_STAGE = dataclasses.replace(OPTIMIZER, groups=(Group(match="embedding.*", weight_decay=0.2),))
"""Only the first stage has parameters in this group."""

DEEPSPEED = [  # which keeps state of its process: an engine a start
    Case("1f1b", "deepspeed", 0, dp=2),
    Case("interleaved_zero_bubble", "deepspeed", 1, dp=2),
    Case("zbv", "deepspeed", 2, tp=2),
    Case("dualpipev", "deepspeed", 3),
    Case("1f1b", "deepspeed", 3, tied=False, optimizer=OF_ONE_STAGE),
    *(
        pytest.param(Case(schedule, "deepspeed", zero, tp=tp, dp=3 - tp, tied=zero < 3), marks=pytest.mark.slow)
        for schedule in SCHEDULES
        for zero in range(4)
        for tp in (1, 2)
    ),
]


@pytest.mark.parametrize("case", DEEPSPEED, ids=str)
def test_pipelines_under_deepspeed_equal_one_process(case):
    assert_equal(case, run(tell, case.ranks, case))


def tell_compiled(case: Case, cache: str) -> tuple[Story, int]:
    """The story, and how often a graph broke. `cache` is where Inductor keeps what it compiled: a new folder."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    return tell(case), sum(torch._dynamo.utils.counters["graph_break"].values())


COMPILED = [
    Case("zbv", "deepspeed", 3, dp=2, compiled="aot_eager"),
    Case("interleaved_zero_bubble", compiled="aot_eager", micro_batch=2, recompute="full"),
    *(
        pytest.param(
            Case(schedule, "deepspeed", zero, tp=2, dp=2, compiled="inductor"),
            marks=pytest.mark.slow,
            id=f"{schedule}-zero{zero}",
        )
        for schedule in ("zbv", "dualpipev")
        for zero in (1, 2, 3)
    ),
]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_zero_bubble_with_compiled_blocks_equals_one_process_without_a_graph_break(case, tmp_path):
    told = run(tell_compiled, case.ranks, case, str(tmp_path), timeout=1800)
    assert [breaks for _, breaks in told] == [0] * case.ranks
    assert_equal(case, [story for story, _ in told])


def poison() -> tuple[Any, bool, bool]:
    """A gradient that is not finite on the last stage: which ranks skip, and whether anything changed."""
    case = Case("zbv")
    mesh = case.mesh()
    engine: Any = case.engine_of(mesh)
    engine.step(case.rows(batch_of(0), mesh), LR)
    if mesh.rank == 1:  # a stage in the middle of the V
        block = next(iter(engine.model.layers.values()))
        block.feed_forward_norm.weight.register_hook(lambda g: g * torch.nan)
    before = pieces_of(engine)
    report = engine.step(case.rows(batch_of(1), mesh), LR)
    same = all(torch.equal(a, b) for (_, a), (_, b) in zip(before, pieces_of(engine), strict=True))
    return floats(report), same, len(before) > 10


def test_a_gradient_that_is_not_finite_on_one_stage_is_skipped_on_all() -> None:
    for report, same, holds_something in run(poison, 2):
        assert report[3] == 1
        assert same
        assert holds_something


def first_losses(cases: list[Case]) -> list[list[float]]:
    found = []
    for case in cases:
        mesh = case.mesh()
        engine = case.engine_of(mesh)
        found.append([floats(engine.step(case.rows(batch_of(k), mesh), LR))[0] for k in range(STEPS)])
        engine.close()
    return found


def test_bf16_stages_follow_one_process_in_bf16() -> None:
    cases = [
        Case("zbv", parameters="bf16"),
        Case("interleaved_zero_bubble", "fsdp2", 2, parameters="bf16"),
        Case("1f1b", "fsdp2", 2, parameters="bf16", tied=False),
        Case("dualpipev", "deepspeed", 2, parameters="bf16"),
    ]
    told = run(first_losses, 2, cases)
    for of_rank in told:
        for case, losses in zip(cases, of_rank, strict=True):
            [expected] = first_losses([dataclasses.replace(ONE, tied=case.tied, parameters="bf16")])
            assert losses == pytest.approx(expected, rel=5e-3), case


MANY = 1000
FIRST_GRADIENT = dataclasses.replace(OPTIMIZER, betas=(0.0, 0.9), clip=None)
"""Without momentum, exp_avg is the gradient that was applied."""


def applied_gradients(cases: list[Case]) -> list[Pieces]:
    found = []
    for case in cases:
        mesh = case.mesh()
        engine = case.engine_of(mesh)
        engine.step(case.rows(toy_batch(0, MANY), mesh), LR)
        found.append([p for p in pieces_of(engine) if p[0].state == "exp_avg"])
        engine.close()
    return found


def exact_gradients() -> dict[str, Tensor]:
    """The float64 sum of all bf16 micro-gradients of one process."""
    sums: dict[str, Tensor] = {}

    def note(name: str, gradient: Tensor) -> None:
        sums[name] = sums.get(name, 0) + gradient.double()

    def watch(model: Any) -> None:
        for name, p in model.named_parameters():
            p.register_hook(partial(note, name))

    one = dataclasses.replace(ONE, micro_batch=1, parameters="bf16", optimizer=FIRST_GRADIENT)
    engine = one.engine_of(Mesh(), watch)
    engine.step(toy_batch(0, MANY), LR)
    return sums


def in_bf16(schedules: Iterable[str], *engines: tuple[str, int]) -> list[Case]:
    return [
        Case(schedule, engine, zero, parameters="bf16", optimizer=FIRST_GRADIENT, tied=engine != "fsdp2")
        for schedule in schedules
        for engine, zero in engines
    ]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "cases",
    [
        in_bf16(["zbv"], ("plain", 0)),
        pytest.param(in_bf16(SCHEDULES, ("plain", 0), ("fsdp2", 2)), marks=pytest.mark.slow),
        *(
            pytest.param(in_bf16([schedule], ("deepspeed", zero)), marks=pytest.mark.slow)
            for schedule in SCHEDULES
            for zero in range(3)
        ),
    ],
    ids=lambda cases: str(cases[0]).split("-parameters")[0],
)
def test_a_thousand_bf16_gradients_are_summed_to_a_thousandth_under_a_schedule(cases):
    exact = exact_gradients()
    for case, *ranks in zip(cases, *run(applied_gradients, 2, cases, timeout=1500), strict=True):
        applied = assembled(ranks)
        for name, expected in exact.items():
            if case.tied:  # else the embedding has another gradient
                found = applied["exp_avg", name].double()
                error = (found - expected.reshape(found.shape)).norm() / expected.norm()
                assert error < 1e-3, f"{case}: {name}: {error}"


def train_with_a_frozen_embedding() -> tuple[float, bool]:
    case = Case("1f1b")
    mesh = case.mesh()

    def freeze(model: Any) -> None:
        if model.embedding is not None:
            model.embedding.weight.requires_grad_(False)

    engine: Any = case.engine_of(mesh, freeze)
    before = engine.model.embedding.weight.clone()
    report = engine.step(case.rows(batch_of(0), mesh), LR)
    return float(report.loss), torch.equal(engine.model.embedding.weight, before)


def test_a_tied_embedding_that_is_not_trained_stays_as_it_is_at_both_ends() -> None:
    for loss, unchanged in run(train_with_a_frozen_embedding, 2):
        assert loss == pytest.approx(one(True, STEPS).reports[0][0], rel=1e-5)
        assert unchanged
