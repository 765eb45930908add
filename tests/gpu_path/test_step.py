"""A whole training step of every shipped configuration on a fake card: nothing waits, nothing is on a wrong device."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.gpu_path.plants import PLANTS

ROOT = Path(__file__).parents[2]
BUDGETS = Path(__file__).with_name("budgets.yaml")

ONE_CARD = ("layout.engine=plain", "layout.zero=0", "layout.recompute=none")
SMALL = ("train.global_batch=1", "layout.micro_batch=1")

STEPS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "llama-124m": (["run/llama-124m"], ("train.global_batch=2", "layout.micro_batch=1")),
    "llama-124m packed": (["run/llama-124m"], (*SMALL, "--packed")),
    "llama-124m recomputed": (["run/llama-124m"], (*SMALL, "layout.recompute=full")),
    "gpt2-124m": (["run/llama-124m", "model/gpt2-124m"], SMALL),
    "gpu-0.5b": (["bench/gpu-0.5b"], SMALL),
    "gpu-1b": (["bench/gpu-1b"], ("--vocab", "128256")),
    "gpu-8b-6l": (["bench/gpu-8b-6l"], ("--vocab", "128256")),
    "gpu-1b compiled": (["bench/gpu-1b"], ("layout.compile=true", "train.global_batch=8", "--vocab", "128256")),
    "gpu-8b-6l compiled": (["bench/gpu-8b-6l"], ("layout.compile=true", "--vocab", "128256")),
    "llama-8b": (["run/llama-124m", "model/llama-8b"], (*SMALL, "data.seq_len=8192")),
}
"""Name -> configurations, later over earlier, and what is changed in them: one card, and few micro-batches."""

LONG = {"llama-124m recomputed", "gpu-0.5b", "gpu-1b", "gpu-8b-6l"}
"""Of which others here show nearly the same."""


def names(but: str | None = None) -> list[Any]:
    """All steps but this, the long ones marked slow."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in STEPS if name != but]


def lines_of(*arguments: str, program: str = "step") -> list[dict[str, Any]]:
    """What a program of this folder printed. A process of its own, since the fake card must be there before torch."""
    command = [sys.executable, "-m", f"tests.gpu_path.{program}", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr[-3000:]
    return lines


def lines_of_run(configs: list[str], *arguments: str, program: str = "step") -> list[dict[str, Any]]:
    """`lines_of` a program for a run file of these configurations, which is written here: models are parts of runs."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run.yaml"
        run.write_text(yaml.safe_dump({"base": [str(ROOT / f"configs/{c}.yaml") for c in configs]}))
        return lines_of(str(run), *arguments, program=program)


@functools.cache
def step(name: str) -> dict[str, Any]:
    """What was seen of the second step."""
    configs, changes = STEPS[name]
    seen = lines_of_run(configs, *ONE_CARD, *changes)[0]
    counted, places = seen["counted_flops"], seen["places"]  # torch counts each place for a document as a whole row
    return seen | {"counted_flops": {op: n // places if "attention" in op else n for op, n in counted.items()}}


@pytest.mark.parametrize("name", names())
def test_a_step_never_waits_for_the_card_and_keeps_every_tensor_on_it(name: str) -> None:
    seen = step(name)
    assert seen["raised"] is None
    assert seen["syncs"] == []
    assert seen["mixes"] == []


@pytest.mark.parametrize("name", names())
def test_every_matrix_product_of_a_bf16_run_is_in_bf16(name: str) -> None:
    assert set(step(name)["products"]) == {"bfloat16"}


@pytest.mark.parametrize("name", names(but="llama-124m recomputed"))
def test_counted_flops_equal_the_formula_behind_mfu(name: str) -> None:
    """Torch counts causal attention as a full square, and backward as five products where the formula has four."""
    seen = step(name)
    counted, formula = seen["counted_flops"], seen["formula_flops"]
    attention = sum(n for op, n in counted.items() if "attention" in op)
    products = sum(counted.values()) - attention
    full_square = 2 * (formula["palm"] - formula["causal"])  # forward two products, backward four
    assert products == formula["palm"] - full_square
    assert attention == full_square * 7 / 6


@pytest.mark.parametrize("name", names())
def test_costs_stay_within_a_hundredth_of_their_budget(name: str) -> None:
    """A change that costs or saves more changes `budgets.yaml` too: `python -m tests.gpu_path.test_step` writes it."""
    budget, seen = yaml.safe_load(BUDGETS.read_text())[name], costs(step(name))
    off = {key: (seen[key], budget[key]) for key in budget if abs(seen[key] - budget[key]) > 0.01 * budget[key]}
    assert not off, f"(now, budget): {off}"
    assert budget.keys() == seen.keys()


@functools.cache
def block(recompute: str, *words: str) -> dict[str, Any]:
    """What a compiled block of gpu-1b, 4 x 4,096 tokens, keeps for backward."""
    return lines_of("configs/bench/gpu-1b.yaml", f"layout.recompute={recompute}", *words, program="block")[0]


def test_equal_blocks_share_one_compiled_graph() -> None:
    for seen in (block("none", "--generated"), block("elementwise")):
        assert (seen["forwards"], seen["backwards"]) == (1, 1)


def test_one_graph_goes_from_document_to_document_however_many_a_row_holds() -> None:
    packed = block("none", "--packed")
    assert (packed["forwards"], packed["backwards"]) == (1, 1)
    assert packed["attention"] == ["_flash_attention_forward"]
    assert packed["kept_bytes"] < block("none", "--generated")["kept_bytes"] + 1e6  # a mask would be 64 MB


def test_a_compiled_block_keeps_no_more_than_its_products_need() -> None:
    """Inputs of products, queries, keys, values and what attention gives: 1,244 MB. What norms give is 134 MB of that,
    the activation 268."""
    assert block("none", "--generated")["kept_bytes"] < 1.245e9
    assert block("norms", "--generated")["kept_bytes"] < 1.110e9
    assert block("elementwise")["kept_bytes"] < 0.842e9


def test_the_compiler_writes_few_kernels_for_a_block() -> None:
    """A launch costs a card 2 us at least. Twelve products and two of attention are the libraries'."""
    generated = block("none", "--generated")["generated"]
    forward, backward = (list(generated[name]) for name in ("forward", "backward"))
    assert sum(generated["forward"].values()) <= 11
    assert sum(generated["backward"].values()) <= 17  # each norm's gain: its shares are added up in two
    assert (generated["forward"]["mm"], generated["backward"]["mm"]) == (4, 8)
    assert "aten._scaled_dot_product_flash_attention" in forward
    assert "aten._scaled_dot_product_flash_attention_backward" in backward


def test_recomputing_elementwise_does_no_product_again() -> None:
    assert block("elementwise")["products_again"] == block("norms", "--generated")["products_again"] == 0


def test_recomputing_norms_costs_a_block_a_launch_for_each() -> None:
    kept, again = (sum(block(what, "--generated")["generated"]["backward"].values()) for what in ("none", "norms"))
    assert again <= kept + 2


@functools.cache
def planted() -> dict[str, dict[str, Any]]:
    run = ("configs/run/llama-124m.yaml", *ONE_CARD, *SMALL, "model.n_layers=2", "--plants")
    return {line["plant"]: line for line in lines_of(*run)}


@pytest.mark.parametrize("fault", PLANTS)
def test_a_planted_fault_is_found_with_its_line(fault: str) -> None:
    seen = planted()[fault]
    if fault == "product_in_float32":
        assert seen["products"]["float32"] > 0
        return
    found = seen["syncs"] + seen["mixes"]
    assert found
    if fault == "synchronize_stream":  # nothing can be put in front of torch's own class
        assert "synchronize() of a stream or an event" in found[0]
    elif fault == "batch_not_pinned":
        assert "not pinned at batch.py" in found[0]
    elif fault == "clip_that_looks":
        assert all("plants.py" in f for f in found)
    else:
        assert "plants.py:" in found[0]
        assert found[0].endswith(("and_read" if fault == "numbers_read_at_once" else fault,))


def costs(seen: dict[str, Any]) -> dict[str, int]:
    """What a budget holds of a step."""
    names = ("launches", "bytes_moved", "static_bytes", "peak_bytes", "reserved_bytes")
    return {name: seen[name] for name in names} | {"flops": sum(seen["counted_flops"].values())}


if __name__ == "__main__":
    BUDGETS.write_text(yaml.safe_dump({name: costs(step(name)) for name in STEPS}, sort_keys=False))
