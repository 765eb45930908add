"""What is legal in a layout, and the words in which the rest is refused."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatrain.base.errors import LayoutError
from megatrain.config.build import build
from megatrain.config.source import Node
from megatrain.engine.api import ENGINE, EngineCase, Precision
from megatrain.engine.layout import Layout, Resolved, layout_problems, resolve_engine, world_problems


def test_the_default_layout_fits_one_rank_without_a_word():
    assert Layout().problems() == []
    assert layout_problems(Layout(), 1, 8) == []
    assert Layout().mesh(1).size == 1


@pytest.mark.parametrize(
    ("layout", "world", "engine", "zero"),
    [
        (Layout(), 1, "plain", 0),
        (Layout(), 4, "deepspeed", 1),
        (Layout(tp=4), 4, "plain", 0),
        (Layout(tp=2), 4, "deepspeed", 1),
        (Layout(zero=3), 4, "deepspeed", 3),
        (Layout(zero=2), 1, "deepspeed", 2),
        (Layout(zero=0), 4, "deepspeed", 0),
        (Layout(engine="plain"), 4, "plain", 0),
        (Layout(engine="deepspeed"), 1, "deepspeed", 0),
    ],
)
def test_auto_is_plain_for_one_data_parallel_rank_and_deepspeed_for_more(layout, world, engine, zero):
    assert resolve_engine(layout, world) == Resolved(engine, zero)


def test_a_mesh_is_made_of_what_tp_leaves():
    mesh = Layout(tp=4).mesh(8)
    assert (mesh.tp, mesh.dp, mesh.pp, mesh.cp, mesh.ep) == (4, 2, 1, 1, 1)
    assert Layout(tp=4, dp=2).mesh(8) == mesh


@pytest.mark.parametrize(
    ("layout", "world", "words"),
    [
        (Layout(tp=3), 8, "tp x pp x cp = 3 x 1 x 1 = 3 does not divide the 8 ranks"),
        (Layout(tp=3), 8, "pick tp from [1, 2, 4, 8]"),
        (Layout(tp=2, dp=3), 8, "layout.dp=3, but 8 ranks / (tp x pp x cp = 2 x 1 x 1 = 2) = 4"),
        (Layout(tp=2, dp=3), 8, "start 6 ranks"),
    ],
)
def test_sizes_that_do_not_multiply_to_the_ranks_are_refused_with_the_arithmetic(layout, world, words):
    [sentence] = layout_problems(layout, world, 8)
    assert words in sentence
    with pytest.raises(LayoutError):
        layout.mesh(world)


@pytest.mark.parametrize(
    ("layout", "world", "global_batch", "words"),
    [
        (
            Layout(),
            4,
            6,
            "train.global_batch=6 does not divide over dp=4 (= 4 ranks / (tp 1 x pp 1 x cp 1)): use a multiple of 4",
        ),
        (Layout(), 4, 6, "pick dp from [1, 2, 3, 6]"),
        (Layout(micro_batch=4), 2, 12, "the 6 sequences that each rank has (train.global_batch 12 / dp 2)"),
        (Layout(micro_batch=4), 2, 12, "pick it from [1, 2, 3, 6]"),
        (Layout(tp=4), 4, 4, "cannot be cut over tp=4: pick tp from [1, 2, 3, 6]"),
        (Layout(engine="plain", zero=2), 2, 4, "layout.zero=2 is not for it"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_with_what_would(layout, world, global_batch, words):
    [sentence] = layout_problems(layout, world, global_batch, seq_len=6)
    assert words in sentence


def test_without_sequence_parallelism_any_sequence_fits():
    assert layout_problems(Layout(tp=4, sequence_parallel=False), 4, 4, seq_len=6) == []
    assert Layout(tp=4).cuts_sequence
    assert not Layout(tp=4, sequence_parallel=False).cuts_sequence
    assert not Layout(sequence_parallel=True).cuts_sequence


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 64), st.integers(1, 8))
def test_what_is_not_refused_covers_the_batch_exactly(world, tp, global_batch, micro_batch):
    layout = Layout(tp=tp, micro_batch=micro_batch)
    if layout_problems(layout, world, global_batch):
        return
    mesh = layout.mesh(world)
    assert mesh.size == world
    passes = global_batch / (mesh.dp * micro_batch)
    assert passes == int(passes) >= 1


@given(st.integers(1, 64), st.integers(1, 16))
def test_a_tp_that_is_suggested_fits(world, tp):
    for sentence in world_problems(Layout(tp=tp), world):
        for choice in json.loads(sentence.split("pick tp from ")[1]):
            assert world_problems(Layout(tp=choice), world) == []


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout(tp=0), "tp=0: it must be at least 1"),
        (Layout(micro_batch=0), "micro_batch=0: it must be at least 1"),
        (Layout(engine="deepsped"), "did you mean deepspeed?"),
        (Layout(zero=4), "zero=4 is no stage of ZeRO: pick 0, 1, 2 or 3"),
        (Layout(schedule="zvb"), "did you mean zbv?"),
        (Layout(pp=2, virtual=0), "virtual=0: it must be at least 1"),
        (Layout(virtual=2), "virtual=2 is for a pipeline and pp is 1"),
        (Layout(stages=(2, 2)), "stages=(2, 2) is for a pipeline and pp is 1"),
        (Layout(ep=2), "ep=2: only ep=1 can be run so far"),
    ],
)
def test_fields_out_of_range_are_refused_by_name(layout, words):
    [sentence] = layout.problems()
    assert words in sentence


def test_a_layout_is_read_from_a_run_file():
    tree = Node({"tp": Node(2, "run.yaml:2"), "zero": Node(None, "run.yaml:3")}, "run.yaml:1")
    assert build(Layout, tree)[0] == Layout(tp=2)


def test_bf16_parameters_are_not_computed_with_in_fp32():
    [sentence] = Precision(parameters="bf16").problems()
    assert "set compute=bf16" in sentence
    assert Precision(compute="bf16", parameters="bf16").problems() == []
    assert Precision(compute="bf16").autocast is not None
    assert Precision(compute="bf16", parameters="bf16").autocast is None


@pytest.mark.parametrize("kind", ENGINE.kinds())
def test_every_engine_runs_some_stage_in_every_precision(kind):
    for precision in (Precision(), Precision(compute="bf16"), Precision(compute="bf16", parameters="bf16")):
        reasons = [ENGINE[kind]().unsupported_reasons(EngineCase(zero=z, precision=precision)) for z in range(4)]
        assert [] in reasons


def test_checking_a_layout_does_not_import_deepspeed():
    code = (
        "import sys; from megatrain.engine.layout import *; print(layout_problems(Layout(zero=3), 4, 8), "
        "'deepspeed' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"
