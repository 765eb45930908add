"""Ranks of a cluster of 512 cards (pp 4 x dp 16 x tp 8), played one by one: what they send in a step of an 8B model.

Here the model has two layers a stage, which changes counts as the formulas say and nothing else; whole in `slow` tests.
"""

import functools
from typing import Any

import pytest

from tests.gpu_path.test_step import lines_of_run

MODEL = ("layout.tp=8", "layout.pp=4", "layout.recompute=none", "layout.micro_batch=1", "data.seq_len=8192")
FEW = ("train.global_batch=64", "model.n_layers=8")
CASES = {
    "plain 1f1b": ("layout.engine=plain", "layout.zero=0", "layout.schedule=1f1b", *FEW),
    "fsdp2 interleaved": ("layout.engine=fsdp2", "layout.zero=2", "layout.schedule=interleaved", *FEW),
}
WHOLE = {
    "whole plain zbv": ("layout.engine=plain", "layout.zero=0", "layout.schedule=zbv", "train.global_batch=128"),
    "whole fsdp2 1f1b": ("layout.engine=fsdp2", "layout.zero=2", "layout.schedule=1f1b", "train.global_batch=128"),
}
STAGE = 128
"""Ranks of one stage: 16 data-parallel times 8 tensor-parallel, which are neighbours."""
RANKS = (0, 7, 120, STAGE, 2 * STAGE, 3 * STAGE)
"""One of each stage; of the first, one more of its tensor-parallel and one more of its data-parallel group."""


@functools.cache
def played(case: str) -> dict[int, dict[str, Any]]:
    """What each rank of `RANKS` did in its second step."""
    return {line["rank"]: line for line in of_ranks(case, RANKS)}


def of_rank(case: str, rank: int, *changes: str) -> dict[str, Any]:
    (line,) = of_ranks(case, (rank,), *changes)
    return line


def of_ranks(case: str, ranks: tuple[int, ...], *changes: str) -> list[dict[str, Any]]:
    given = (*MODEL, *(CASES | WHOLE)[case], *changes, "--ranks", *map(str, ranks))
    return lines_of_run(["run/llama-124m", "model/llama-8b"], *given, program="cluster")


every_case = pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in WHOLE)])


@every_case
def test_calls_and_bytes_of_every_axis_equal_the_closed_forms(case: str) -> None:
    for rank, seen in played(case).items():
        assert seen["counted"] == seen["formula"], f"rank {rank} at {seen['place']}"


@every_case
def test_no_rank_waits_for_its_card_or_mixes_devices(case: str) -> None:
    for seen in played(case).values():
        assert seen["syncs"] == []
        assert seen["mixes"] == []


@every_case
def test_ranks_of_a_group_call_its_collectives_in_the_same_order(case: str) -> None:
    """Two lists that differ are a deadlock, or a sum of things that do not belong together."""
    ranks = played(case)
    for other, axis in ((7, "tp"), (120, "data")):
        mine, theirs = ([call for call in ranks[r]["calls"] if call[0] == axis] for r in (0, other))
        assert len(mine) > 0
        assert mine == theirs


@every_case
def test_what_the_stages_send_is_what_they_receive(case: str) -> None:
    ranks = played(case)
    sent, received = (
        [sum(ranks[stage * STAGE]["counted"].get(f"pp {op}", [0, 0])[i] for stage in range(4)) for i in (0, 1)]
        for op in ("send", "recv")
    )
    assert sent == received
    assert sent[0] > 0


@pytest.mark.parametrize("case", ["fsdp2 interleaved", pytest.param("plain 1f1b", marks=pytest.mark.slow)])
def test_compiled_blocks_call_what_uncompiled_ones_do(case: str) -> None:
    """Nor do they keep the rows of all ranks until backward, which the compiler would where it saw two equal calls."""
    compiled, eager = of_rank(case, STAGE, "layout.compile=true"), played(case)[STAGE]
    assert compiled["counted"] == eager["counted"] == compiled["formula"]
    assert compiled["syncs"] == compiled["mixes"] == []
    assert compiled["peak_bytes"] < 0.9 * eager["peak_bytes"]


def test_a_middle_stage_sends_what_arithmetic_by_hand_says() -> None:
    seen = played("plain 1f1b")[STAGE]["counted"]
    hidden, layers, micro_batches = 8192 * 4096 * 2, 2, 4  # bytes of [1, 8192, 4096] in bf16
    assert seen["tp all_gather"] == [6 * layers * micro_batches, 6 * layers * micro_batches * hidden]
    assert seen["tp reduce_scatter"] == [4 * layers * micro_batches, 4 * layers * micro_batches * hidden]
    assert seen["pp send"] == [2 * micro_batches, 2 * micro_batches * hidden // 8]
