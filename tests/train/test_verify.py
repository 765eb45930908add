"""`megatrain verify` says equal of what is equal, and finds what is not."""

from pathlib import Path

import pytest
import torch.distributed as dist

from megatrain.base.errors import ConfigError
from megatrain.engine.layout import Layout
from megatrain.train.config import read_run
from megatrain.train.verify import compare, layout_of, prepared, relative, take_steps
from tests.ranks import run
from tests.train.small import write_run

STEPS = 3


def side(path: str, layout: str, folder: str) -> None:
    found = read_run(path).run
    chosen, world = layout_of(layout, found.layout)
    mesh = chosen.mesh(world)
    if world > 1:
        mesh = mesh.at(dist.get_rank()).connect()
    take_steps(prepared(found, chosen), mesh, STEPS, Path(folder))


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory, text_data: Path) -> str:
    """A run with dropout, packed documents and two micro-batches a rank."""
    return str(
        write_run(
            tmp_path_factory.mktemp("verify"), text_data, model__dropout=0.1, model__n_heads=8, model__n_kv_heads=2
        )
    )


@pytest.fixture(scope="module")
def one(run_file: str) -> Path:
    folder = Path(run_file).parent / "one"
    side(run_file, "engine=plain", str(folder))
    return folder


@pytest.mark.parametrize(
    "layout",
    ["tp=2", "dp=2,zero=1", "pp=2,tp=2,stages=[1,1]"],  # tests/layouts has them all
)
def test_layouts_equal_one_process(run_file: str, one: Path, tmp_path: Path, layout: str) -> None:
    chosen, world = layout_of(layout, Layout())
    run(side, world, run_file, layout, str(tmp_path / "many"))
    verdict = compare(one, tmp_path / "many", layout, STEPS, chosen)
    assert verdict.equal, verdict.line()
    assert verdict.line().startswith("equal: loss ")


def test_a_layout_is_read_with_unnamed_axes_at_one() -> None:
    layout, world = layout_of("tp=2,dp=3,zero=1", Layout(micro_batch=4, tp=8))
    assert (layout.tp, layout.dp, layout.zero, layout.micro_batch, world) == (2, 3, 1, 4, 6)
    assert layout_of("pp=2,stages=[3,1],tp=2", Layout())[0] == Layout(pp=2, stages=(3, 1), tp=2, dp=1, zero=0)
    assert layout_of("tp=2", Layout(pp=2, stages=(1, 3)))[0] == Layout(tp=2, dp=1, zero=0)
    assert layout_of("tp=2", Layout(dp=4)) == (Layout(tp=2, dp=1, zero=0, pp=1, cp=1, ep=1), 2)


def test_what_a_layout_says_is_read_as_in_a_run_file() -> None:
    assert layout_of("tp=2,sequence_parallel=false", Layout())[0].sequence_parallel is False
    assert layout_of("tp=2,compile=false", Layout())[0].compile is False
    assert layout_of('recompute="0-1,3",dp=2', Layout())[0].recompute == "0-1,3"
    assert layout_of("dp=2,engine=fsdp2", Layout())[0].zero is None  # which fsdp2 takes for 2
    assert layout_of("dp=2", Layout(engine="deepspeed"))[0].zero == 0


WRONG = [
    ("tq=2", "did you mean tp?"), ("tp", "'tp' is not key=value"), ("tp=0", "at least 1"), ("", "names nothing"),
    (",", "names nothing"), ("tp=2,tp=1", "tp stands twice"), ("tp=two", "whole number"), ("tp=", "whole number"),
    ("tp=[2]", "whole number"), ("tp=2 dp=2", "whole number"), ("tp=2;dp=2", "whole number"),
    ("tp=1.5", "whole number"),
    ("tp=NaN", "whole number"), ("tp=1e400", "whole number"), ("tp=null", "whole number"),
    ("tp=true", "whole number"), ("zero=true", "whole number"), ("sequence_parallel=banana", "true or false"),
    ("sequence_parallel=0", "true or false"), ("compile=banana", "compile"), ("device=banana", "device"),
    ("engine=5", "no engine"), ("engine=banana", "no engine"), ("schedule=1", "allowed: 1f1b"), ("schedule={}", "text"),
    ("recompute=[1,2]", "text"), ("pp=2,stages=3", "stages"),
    ("pp=2,stages=[[1],3]", "YAML"),
    ("pp=2,stages=[true,3]", "stages"), ("pp=2,stages=Auto", "stages"),
    ('pp=2,stages=["a",3]', "stages"), ("pp=2,stages=[3,", "YAML"), ("sequence_parallel=False", "true or false"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), WRONG)
def test_a_wrong_layout_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        layout_of(text, Layout())


def test_what_is_no_number_is_not_equal() -> None:
    assert relative(1.0, float("nan")) == float("inf")
    assert relative(float("nan"), float("nan")) == float("inf")
