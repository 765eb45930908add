"""Every layout trains as one process does: losses, gradient norms and full gradients over ten steps, clip active.

A row of the table is a run and a layout. To add a layout, add a line.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatrain.engine.api import ENGINE
from megatrain.engine.schedules import SCHEDULES
from megatrain.nn.context import CONTEXT
from tests.layouts.sides import ALONE, Job, compared, small_run, take_all
from tests.layouts.table import CI, ROWS, Row, axes_of, impossible, pairs_of

STEPS, CI_STEPS = 10, 3
FIGURES = Path(__file__).parent / "FIGURES.md"
HEAD = """# Layouts against one process

Written by `make test-layouts`. Largest relative difference over ten steps in float32: of the losses, of the gradient
norms, and of each full gradient (the first step's, and the optimiser's average of all ten). Allowed: 1e-5, 1e-5, 1e-4.
A row of the table that is not here has not been run yet.

| run | layout | loss | norm | gradients |
|---|---|---|---|---|
"""
BATCH = 16
COMMON: dict[str, Any] = {
    "model__n_layers": 4,
    "train__global_batch": BATCH,
    "layout__micro_batch": 1,
    "model__init_std": 0.1,  # with small embeddings a norm divides by almost nothing, and ten steps amplify roundings
    "optimizer__lr": 0.003,
    "optimizer__clip": 0.3,
}

RUNS: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "untied": COMMON | {"model__tie_embeddings": False, "model__dropout": 0.0, "model__n_kv_heads": 8},
    "gpt": COMMON
    | {
        "model__position": {"kind": "learned"},
        "model__norm": {"kind": "layer_norm"},
        "model__feed_forward": {"kind": "gelu", "bias": True},
        "model__n_kv_heads": 4,
        "model__vocab_size": 333,
    },
    "window": COMMON | {"model__attention": {"kind": "sliding_window", "window": 5, "qk_norm": True}},
    "best_fit": COMMON | {"data__packing": {"kind": "best_fit"}},
}
"""Dropout, packed documents and tied embeddings, but for `untied`; `best_fit` leaves rows of unevenly many tokens."""

WIDE = COMMON | {"model__d_model": 256, "model__d_ff": 16384, "model__n_layers": 1}
"""Its matrices have four million elements, so that a sum which loses digits with its length shows."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, text_data: Path) -> dict[str, str]:
    """Run files by name, each with its side of one process beside it."""
    folder = tmp_path_factory.mktemp("parity")
    return {name: small_run(folder / name, text_data, **changes) for name, changes in (RUNS | {"wide": WIDE}).items()}


def one_process(path: str, steps: int) -> Path:
    """The side of one process, which takes each batch at once."""
    folder = Path(path).parent / f"one-{steps}"
    if not folder.exists():
        take_all([Job(path, f"{ALONE},micro_batch={BATCH}", str(folder), steps)])
        norms = json.loads((folder / "numbers-0.json").read_text())["divisors"]
        assert sum(divisor > 1 for divisor in norms) > steps / 2, "the clip is not active"
    return folder


def check(runs: dict[str, str], rows: list[Row], folder: Path, steps: int) -> list[str]:
    """Run the rows and return lines of a table of their worst figures.

    Raises:
        AssertionError: rows that are not equal to one process, all of them.
    """
    jobs = [Job(runs[name], layout, str(folder / str(i)), steps) for i, (name, layout) in enumerate(rows)]
    take_all(jobs)
    lines, wrong = [], []
    for (name, layout), job in zip(rows, jobs, strict=True):
        verdict = compared(one_process(runs[name], steps), job)
        lines.append(f"| {name} | {layout} | {verdict.loss:.0e} | {verdict.norm:.0e} | {verdict.gradients:.0e} |")
        if not verdict.equal:
            wrong.append(f"{name} {layout}: {verdict.line()}")
    assert not wrong, "\n".join(wrong)
    return lines


def test_a_few_layouts_of_each_kind_equal_one_process(runs: dict[str, str], tmp_path: Path) -> None:
    assert len(check(runs, CI, tmp_path, CI_STEPS)) == len(CI)


def test_a_few_layouts_equal_one_process_with_tensors_of_four_million_elements(
    runs: dict[str, str], tmp_path: Path
) -> None:
    layouts = ["tp=2,engine=plain", "dp=2,engine=fsdp2,zero=2", "dp=2,engine=deepspeed,zero=1"]
    assert len(check(runs, [("wide", layout) for layout in layouts], tmp_path, steps=2)) == len(layouts)


@pytest.fixture(scope="module")
def figures() -> Iterator[dict[Row, str]]:
    """Lines of the table by row; at the end written down beside those of rows that were run before."""
    before = FIGURES.read_text().splitlines() if FIGURES.exists() else []
    known = {(words[1].strip(), words[2].strip()): line for line in before if len(words := line.split("|")) > 3}
    lines: dict[Row, str] = {}
    yield lines
    known |= lines
    FIGURES.write_text(HEAD + "".join(f"{known[row]}\n" for row in sorted(ROWS) if row in known))


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=" ".join)
def test_a_layout_equals_one_process(row: Row, runs: dict[str, str], figures: dict[Row, str], tmp_path: Path) -> None:
    [figures[row]] = check(runs, [row], tmp_path, STEPS)


def test_the_table_holds_every_pair_of_values_that_is_possible() -> None:
    values: dict[str, set[str]] = {}
    for row in ROWS:
        for axis, value in axes_of(row).items():
            values.setdefault(axis, set()).add(value)
    assert values["pp"] == {"1", *SCHEDULES}
    assert values["cp"] == {"1", *CONTEXT.kinds()}
    assert values["run"] == set(RUNS)
    assert {engine.split()[0] for engine in values["engine"]} == set(ENGINE.kinds())
    held = set().union(*(pairs_of(row) for row in ROWS))
    wanted = {
        ((a, x), (b, y)) for a, b in itertools.combinations(sorted(values), 2) for x in values[a] for y in values[b]
    }
    assert {pair for pair in wanted - held if not impossible(*pair)} == set()
    assert len(ROWS) == len(set(ROWS)) >= 40
