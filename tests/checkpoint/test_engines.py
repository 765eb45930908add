"""Real engines: what any layout saves, any other takes up with the same bits and goes on with the same losses."""

import itertools
import random
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from megatrain.checkpoint.read import find
from tests.checkpoint.layouts import SAVED_AT, Case, case, every_case, path_of, take_up, train_and_save
from tests.ranks import run

SEED = 11


def call(function, cases: list[tuple[Case, object]], folder: Path) -> dict[Case, object]:
    """`function` over cases, in as few starts as possible: DeepSpeed wants one for each, the others share."""
    found: dict[Case, object] = {}
    shared = defaultdict(list)
    for c, asked in cases:
        shared[c.ranks, c if c.engine == "deepspeed" else None].append((c, asked))
    for (ranks, _), rows in shared.items():
        asked = [what for _, what in rows]
        told = function(asked, str(folder)) if ranks == 1 else run(function, ranks, asked, str(folder), timeout=1800)[0]
        found |= dict(zip((c for c, _ in rows), told, strict=True))
    return found


def assert_same_bits(a: Path, b: Path) -> None:
    a, b = find(a).reader(), find(b).reader()
    assert a.manifest.tensors.keys() == b.manifest.tensors.keys()
    assert {"exp_avg", "exp_avg_sq", "weights"} <= set(a.states())
    assert a.state == b.state
    for state, name in a.manifest.tensors:
        x, y = a.read_full(name, state), b.read_full(name, state)
        assert x.dtype == torch.float32
        assert torch.equal(x.view(torch.int32), y.view(torch.int32)), (state, name)


def check_pairs(pairs: list[tuple[Case, Case]], folder: Path) -> None:
    """Each (source, target): bits after loading, losses of the steps that follow."""
    sources = list(dict.fromkeys(source for source, _ in pairs))
    straight = call(train_and_save, [(c, c) for c in sources], folder)
    for c in sources:
        alone = next((s for s in sources if s.ranks == 1 and s.model == c.model), c)
        assert straight[c] == pytest.approx(straight[alone], rel=1e-5), c
    targets = list(dict.fromkeys(target for _, target in pairs))
    asked = [(t, (t, [source for source, target in pairs if target == t])) for t in targets]
    told = call(take_up, asked, folder)
    for target, (_, chosen) in asked:
        for source, found in zip(chosen, told[target], strict=True):
            assert_same_bits(path_of(folder, source), path_of(folder, source, target))
            assert found == pytest.approx(straight[source][SAVED_AT:], rel=1e-6), f"{source} -> {target}"


def there_and_back(cases: list[Case]) -> list[tuple[Case, Case]]:
    """Each to one process of its model, and that one's to each."""
    alone = {c.model: case(model=c.model) for c in cases}
    return [pair for c in cases for pair in ((c, alone[c.model]), (alone[c.model], c))]


FEW = [
    case("plain", tp=2),
    case("plain", pp=2),
    case("plain", cp=2),
    case("fsdp2", 3, dp=2),
    case("deepspeed", 3, dp=2),
    case("plain", dp=2, model="frozen"),
    case("fsdp2", 2, dp=2, model="frozen"),
]


def test_a_layout_of_each_kind_goes_to_one_process_and_back_and_on_to_another(memory_path):
    across = [(a, b) for a, b in itertools.pairwise(FEW) if a.model == b.model]
    check_pairs(there_and_back(FEW) + across, memory_path)


def test_the_full_list_has_every_axis_engine_and_stage_and_all_cases_of_the_short_one():
    listed = every_case("tied")
    assert {(c.engine, c.layout.zero) for c in listed} == {
        ("plain", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3),
        ("fsdp2", 2), ("fsdp2", 3),
    }  # fmt: skip
    sizes = {(axis, getattr(c.layout, axis)) for c in listed for axis in ("pp", "dp", "cp", "tp")}
    assert sizes == {(axis, n) for axis in ("pp", "dp", "cp", "tp") for n in (1, 2, 3, 4)}
    assert set(FEW) <= set(listed) | set(every_case("frozen"))
    assert not any(c.engine == "deepspeed" and c.layout.zero for c in every_case("frozen"))


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("model", ["tied", "untied", "frozen"])
def test_every_layout_goes_to_one_process_and_back(model, memory_path):
    check_pairs(there_and_back(every_case(model)[1:]), memory_path)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("model", ["tied", "untied", "frozen"])
def test_forty_pairs_by_a_printed_seed_go_across(model, memory_path):
    layouts, r = every_case(model)[1:], random.Random(SEED)
    print(f"pairs are drawn with seed {SEED}")
    pairs = [tuple(r.sample(layouts, 2)) for _ in range(40)]
    for source, target in pairs:
        print(f"{source} -> {target}")
    check_pairs(list(dict.fromkeys(pairs)), memory_path)
