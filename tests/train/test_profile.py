import gzip
import json
from pathlib import Path

import torch

from megatrain.train.hook import Handle
from megatrain.train.hooks.profile import Profile


def run_steps(hook, n: int) -> None:
    for step in range(1, n + 1):
        torch.ones(3) @ torch.ones(3)
        if hook.due(step):
            hook.after_step({"step": step})


def traced_products(folder: Path) -> int:
    with gzip.open(folder / "profile/trace-rank0.json.gz") as f:
        events = json.load(f)["traceEvents"]
    return sum(event.get("name") == "aten::dot" for event in events)


def test_the_steps_that_were_asked_for_are_traced(tmp_path: Path) -> None:
    noted = []
    handle = Handle(tmp_path, 0, 1, 9, 1, note=lambda kind, **facts: noted.append(kind))
    run_steps(Profile(after=2, steps=3).build(handle), 9)
    assert traced_products(tmp_path) == 3
    assert noted == ["profiled"]


def test_a_run_that_ends_early_leaves_what_was_traced(tmp_path: Path) -> None:
    hook = Profile(after=1, steps=100).build(Handle(tmp_path, 0, 1, 200, 1))
    run_steps(hook, 4)
    hook.finish("preempted")
    assert traced_products(tmp_path) == 3


def test_nothing_is_written_before_its_time(tmp_path: Path) -> None:
    hook = Profile(after=50).build(Handle(tmp_path, 0, 1, 60, 1))
    run_steps(hook, 20)
    hook.finish("finished")
    assert list(tmp_path.iterdir()) == []


def test_spans_that_cannot_be_are_refused() -> None:
    assert Profile().problems() == []
    assert len(Profile(after=0, steps=0).problems()) == 2
