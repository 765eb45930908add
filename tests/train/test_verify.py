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


@pytest.mark.parametrize(("text", "words"), [("tq=2", "did you mean tp?"), ("tp", "no key"), ("tp=0", "at least 1")])
def test_a_wrong_layout_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        layout_of(text, Layout())


def test_what_is_no_number_is_not_equal() -> None:
    assert relative(1.0, float("nan")) == float("inf")
    assert relative(float("nan"), float("nan")) == float("inf")
