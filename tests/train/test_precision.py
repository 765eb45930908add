"""Formats of a run from its file to its report: the table, the guard's looks, and what is refused before it starts."""

from pathlib import Path

import pytest

from megatrain.base.errors import ConfigError
from megatrain.parallel.mesh import Mesh
from megatrain.report.page import page
from megatrain.report.run import read_run as read_record
from megatrain.train.build import quantised
from megatrain.train.config import read_run
from megatrain.train.run import train
from tests.nn import engine_stand_in
from tests.ranks import run
from tests.train.small import events, metrics, on_ranks, write_run

EIGHT_BITS = {
    "precision__compute": "bf16",
    "precision__fp8": {"min_size": 0, "keep_first": 0, "keep_last": 0, "guard_every": 3, "guard_limit": 0.034},
    "train__steps": 7,
    "train__eval_every": 0,
}
"""A limit that some layers are above, so that the guard has something to tell."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text_data: Path) -> Path:
    folder = tmp_path_factory.mktemp("fp8")
    run = read_run(write_run(folder, text_data, **EIGHT_BITS)).run
    train(run)
    return run.folder


def test_the_table_of_formats_is_kept_with_the_run(finished: Path) -> None:
    [started] = events(finished, "started")
    assert started["facts"]["kernels"]["attention"].startswith("FlashAttention")
    table = started["facts"]["dtypes"]
    assert table["products"] == "bf16"
    assert table["parameters"] == "fp32"
    assert table["fp8 products"].startswith("e4m3 (tensorwise)")


def test_each_look_of_the_guard_is_written_once_with_every_layer(finished: Path) -> None:
    looks = events(finished, "guard")
    assert [look["before_step"] for look in looks] == [1, 4, 7]
    for look in looks:
        assert len(look["errors"]) == len(look["flushed"]) == 8
        assert all(0.005 < error < 0.1 for error in look["errors"].values())
        assert abs(look["loss_gap"]) < 0.1
    demoted = {name for look in looks for name in look["demoted"]}
    assert demoted == {n for look in looks for n, error in look["errors"].items() if error > 0.034}
    assert demoted
    assert metrics(finished)[-1]["loss"] < metrics(finished)[0]["loss"]


def test_the_report_draws_the_guard(finished: Path) -> None:
    text = page(read_record(finished))
    assert "Error of layers in eight bits" in text
    assert "Loss above that in bf16" in text
    assert "Number formats" in text
    assert "layers.1.feed_forward.down" in text
    assert "demoted at step" in text


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("precision__fp8", {"min_size": 0, "keep_first": 0, "keep_last": 0, "layers": "*.dwon"}, "layers=*.dwon"),
        ("model__d_ff", 40, "feed_forward.down has 40 inputs on a rank, which is no multiple of 16"),
        ("precision__compute", "fp16", "fp16 has too small a range"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(tmp_path: Path, text_data: Path, key, value, words) -> None:
    path = write_run(tmp_path, text_data, **(EIGHT_BITS | {key: value}))
    with pytest.raises(ConfigError) as refused:
        train(read_run(path).run)
    assert words in str(refused.value)
    assert not (tmp_path / "runs").exists()


BY_ENGINE = EIGHT_BITS["precision__fp8"] | {"backend": "transformer_engine", "weight_gradient": "low"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"precision__fp8": BY_ENGINE | {"weight_gradient": "high"}}, "set weight_gradient=low, or backend=torch"),
        ({"data__seq_len": 24}, "multiplies a multiple of 32 tokens at once"),
        ({"data__seq_len": 16}, "a row of data.seq_len tokens over layout.cp ranks makes 16"),  # two would make 32
        ({}, "precision.fp8.backend=transformer_engine needs an NVIDIA GPU, and this is a CPU"),
    ],
)
def test_transformer_engine_is_refused_where_it_cannot_be(tmp_path: Path, text_data: Path, change, words) -> None:
    path = write_run(tmp_path, text_data, **(EIGHT_BITS | {"precision__fp8": BY_ENGINE} | change))
    with pytest.raises(ConfigError) as refused:
        train(read_run(path).run)
    assert words in str(refused.value)


def test_transformer_engine_is_not_compiled(tmp_path: Path, text_data: Path) -> None:
    class Card:
        kind = "cuda"

        def capability(self) -> tuple[int, int]:
            return 9, 0

    run = read_run(write_run(tmp_path, text_data, **(EIGHT_BITS | {"precision__fp8": BY_ENGINE}))).run
    with engine_stand_in.installed(), pytest.raises(ConfigError, match=r"set layout\.compile=false, or backend=torch"):
        quantised(run, None, Mesh(), Card())


PIPED = ("layout.tp=2", "layout.pp=2", "layout.schedule=1f1b", "layout.engine=plain", "layout.compile=true")
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "ranks", "words"),
    [
        ("tensorwise", 2, ("layout.tp=2", "layout.engine=plain")),
        pytest.param("tensorwise", 2, ("layout.engine=fsdp2", "layout.zero=2"), marks=SLOW),
        ("tensorwise", 2, ("layout.cp=2", "layout.engine=plain")),
        pytest.param("rowwise", 2, ("layout.tp=2", "layout.engine=plain"), marks=SLOW),
        pytest.param("mx", 2, ("layout.tp=2", "layout.engine=plain"), marks=SLOW),
        pytest.param(
            "rowwise", 2, ("layout.tp=2", "layout.sequence_parallel=false", "layout.engine=plain"), marks=SLOW
        ),
        pytest.param("rowwise", 2, ("layout.engine=deepspeed", "layout.zero=1"), marks=SLOW),
        pytest.param("tensorwise", 4, PIPED, marks=SLOW),
        pytest.param("rowwise", 4, PIPED, marks=SLOW),
    ],
    ids=str,
)
def test_a_run_in_eight_bits_has_one_loss_curve_under_every_layout(
    kind: str, ranks: int, words: tuple[str, ...], tmp_path: Path, text_data: Path
) -> None:
    """As near as bf16 lets it be: sums over ranks round otherwise, and some numbers then fall on the other side."""
    fp8 = EIGHT_BITS["precision__fp8"] | {"kind": kind, "guard_limit": 0.5}
    changes = EIGHT_BITS | {"precision__fp8": fp8, "model__d_ff": 64, "layout__micro_batch": 1}
    changes |= {"optimizer__lr": 1e-3}  # large steps would amplify roundings, more on some texts than on others
    path = write_run(tmp_path, text_data, **changes)
    train(read_run(path, ["name=alone"]).run)
    run(on_ranks, ranks, str(path), ("name=cut", *words), timeout=600)
    alone, cut = (metrics(tmp_path / "runs" / name) for name in ("alone", "cut"))
    assert len(alone) == len(cut) == 7
    for a, b in zip(alone, cut, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-3 if a["step"] == 1 else 0.01)
    looks = zip(*(events(tmp_path / "runs" / name, "guard") for name in ("alone", "cut")), strict=True)
    for a, b in looks:
        # A scale that is off by a bit rounds a whole operand otherwise, whose error is then another draw of as much.
        assert b["errors"] == pytest.approx(a["errors"], rel=0.15)
        if a["before_step"] == 1:  # these see the same bits
            for name in ("layers.0.attention.to_qkv", "layers.0.attention.to_out"):
                assert b["errors"][name] == pytest.approx(a["errors"][name], rel=0.02)
        assert b["loss_gap"] == pytest.approx(a["loss_gap"], abs=2e-3)
