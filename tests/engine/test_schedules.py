"""What a pipeline asks for, and the words in which the rest is refused, before anything is started."""

import pytest

from megatrain.engine.api import ENGINE, EngineCase, Precision
from megatrain.engine.layout import Layout, layout_problems
from megatrain.engine.schedules import SCHEDULES, PipelinePlan
from megatrain.models.stages import Costs

BATCH = 16


def problems(layout: Layout, world: int, n_layers: int = 8, batch: int = BATCH, tied: bool = False) -> list[str]:
    return layout.problems() or layout_problems(layout, world, batch, n_layers=n_layers, tied=tied)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_runs_with_its_defaults(name: str) -> None:
    layout = Layout(pp=4, schedule=name)
    assert problems(layout, 4) == []
    plan = layout.pipeline(Costs((1.0,) * 8))
    assert plan is not None
    assert sorted(s for rank in range(4) for s in plan.stages_of(rank)) == list(range(plan.n_stages))
    assert all(stage in plan.stages_of(plan.rank_of(stage)) for stage in range(plan.n_stages))


def test_without_a_pipeline_there_is_no_plan_and_the_schedule_does_not_matter() -> None:
    assert Layout(schedule="zbv").pipeline(Costs((1.0,))) is None
    assert problems(Layout(schedule="zbv"), 1, n_layers=1, batch=1) == []


def test_where_stages_stand() -> None:
    loop = PipelinePlan(SCHEDULES["interleaved"], 2, 3, (1,) * 6)
    v = PipelinePlan(SCHEDULES["zbv"], 2, 2, (1,) * 4)
    assert [loop.stages_of(rank) for rank in (0, 1)] == [[0, 2, 4], [1, 3, 5]]
    assert [v.stages_of(rank) for rank in (0, 1)] == [[0, 3], [1, 2]]


@pytest.mark.parametrize(
    ("layout", "world", "options", "words"),
    [
        # ranks
        (Layout(pp=3), 4, {}, ["tp x pp x cp = 1 x 3 x 1 = 3 does not divide the 4 ranks"]),
        (Layout(pp=2, tp=2, dp=2), 4, {}, ["layout.dp=2, but 4 ranks", "= 1: leave dp out, or start 8 ranks"]),
        # layers
        (Layout(pp=4), 4, {"n_layers": 3}, ["n_layers=3 cannot make pp 4 x virtual 1 = 4 stages", "pick pp from [2]"]),
        (Layout(pp=2, schedule="zbv"), 2, {"n_layers": 3}, ["pp 2 x virtual 2 = 4 stages", "set model.n_layers to 4"]),
        (Layout(pp=2, stages=(4, 3)), 2, {}, ["4 + 3 = 7 layers, and model.n_layers=8"]),
        (Layout(pp=2, stages=(8, 0)), 2, {}, ["leaves stage 1 without a layer"]),
        (Layout(pp=2, stages=(2, 3, 3)), 2, {}, ["lists 3 stages and pp 2 x virtual 1 = 2 are run"]),
        (Layout(pp=2, schedule="zbv", stages=(4, 4)), 2, {}, ["lists 2 stages and pp 2 x virtual 2 = 4 are run"]),
        (Layout(pp=2, stages=(9, -1)), 2, {}, ["leaves stage 1 without a layer"]),
        # virtual stages
        (Layout(pp=2, virtual=2), 2, {}, ["schedule 1f1b runs 1 stages a rank", "or set layout.schedule to one of"]),
        (Layout(pp=2, schedule="gpipe", virtual=3), 2, {}, ["interleaved", "looped_bfs", "interleaved_zero_bubble"]),
        (Layout(pp=2, schedule="interleaved", virtual=1), 2, {}, ["schedule interleaved runs 2 or more stages"]),
        (Layout(pp=2, schedule="zbv", virtual=1), 2, {}, ["schedule zbv runs exactly 2 stages"]),
        (Layout(pp=2, schedule="dualpipev", virtual=4), 2, {}, ["schedule dualpipev runs exactly 2 stages"]),
        # micro-batches
        (Layout(pp=4), 4, {"batch": 3}, ["1f1b needs at least pp = 4 micro-batches and a step has 3"]),
        (Layout(pp=4, micro_batch=8), 4, {}, ["needs at least pp = 4 micro-batches and a step has 2"]),
        (Layout(pp=4, schedule="dualpipev"), 4, {"batch": 7}, ["at least 2 x pp = 8 micro-batches and a step has 7"]),
        (Layout(pp=2, schedule="interleaved"), 2, {"batch": 5}, ["5 // pp 2 = 2 equal rounds", "make it 4 or 6"]),
        (Layout(pp=4, schedule="interleaved_zero_bubble"), 4, {"batch": 9}, ["equal rounds", "8 or 10"]),
        (Layout(pp=2, micro_batch=3), 2, {}, ["micro_batch=3 does not divide the 16 sequences"]),
        # what engines cannot do
        (Layout(pp=2, zero=3, dp=2), 4, {"tied": True}, ["tied embeddings", "layout.zero=2", "zbv or dualpipev"]),
        (Layout(pp=2, engine="fsdp2", zero=3), 4, {}, ["layout.zero=3 with layout.pp=2", "set layout.zero=2"]),
        (Layout(pp=2, engine="fsdp2", schedule="zbv"), 4, {"tied": True}, ["cannot share an embedding"]),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_with_the_arithmetic(
    layout: Layout, world: int, options: dict, words: list[str]
) -> None:
    [sentence] = problems(layout, world, **options)
    assert [part for part in words if part not in sentence] == []


def test_bf16_parameters_under_zero_3_in_a_pipeline_are_refused() -> None:
    bf16 = Precision(compute="bf16", parameters="bf16")
    case = EngineCase(zero=3, pp=2, precision=bf16, schedule=SCHEDULES["zbv"])
    [sentence] = ENGINE["deepspeed"]().unsupported_reasons(case)
    assert "layout.engine=fsdp2" in sentence


def test_a_suggested_number_of_micro_batches_is_one_that_runs() -> None:
    schedule = SCHEDULES["interleaved"]
    for p in range(2, 6):
        for m in range(1, 30):
            for sentence in schedule.problems("interleaved", p, m, 2):
                near = sentence.split("to make it ")[1].split(",")[0].split(" or ")
                assert all(schedule.problems("interleaved", p, int(n), 2) == [] for n in near), (p, m)
