"""Optimisers against torch's own plain loops; groups by pattern; steps that clip or change nothing."""

import copy

import pytest
import torch
from torch import nn

from megatrain.config.build import build
from megatrain.config.source import Node
from megatrain.optim.kinds.adamw import AdamW
from megatrain.optim.optimizer import (
    OPTIMIZER,
    Group,
    guarded,
    parameter_groups,
    set_lr,
    set_step_count,
    step_count,
)

ONE, ZERO = torch.tensor(1.0), torch.tensor(0.0)


def guarded_step(optimizer, divisor, found_inf):
    with guarded(optimizer, divisor, found_inf):
        optimizer.step()


def tensors(*, device: str = "cpu") -> dict[str, nn.Parameter]:
    g = torch.Generator().manual_seed(5)
    shapes = {"embedding.weight": (7, 4), "layers.0.norm.weight": (4,), "layers.0.down.weight": (4, 3)}
    return {name: nn.Parameter(torch.randn(shape, generator=g).to(device)) for name, shape in shapes.items()}


def set_gradients(named, step: int, factor: float = 1.0) -> None:
    g = torch.Generator().manual_seed(step)
    for p in named.values():
        p.grad = torch.randn(p.shape, generator=g) * factor


def test_adamw_equals_its_formula_in_float64():
    choice = AdamW(lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2)
    ours = tensors()
    twin = {
        n: (p.detach().double(), torch.zeros(p.shape).double(), torch.zeros(p.shape).double()) for n, p in ours.items()
    }
    optimizer = choice.build(ours)
    for step in range(1, 6):
        set_gradients(ours, step)
        for name, (w, m, v) in twin.items():
            g = ours[name].grad.double()
            m = 0.8 * m + 0.2 * g
            v = 0.9 * v + 0.1 * g * g
            decay = 0.2 if w.ndim > 1 else 0.0
            w = w - 0.1 * (decay * w + (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-3))
            twin[name] = (w, m, v)
        guarded_step(optimizer, ONE, ZERO)
    for name, p in ours.items():
        torch.testing.assert_close(p.detach().double(), twin[name][0], rtol=1e-5, atol=1e-6)


def test_adamw_takes_the_steps_of_torch_adamw():
    ours, theirs = tensors(), tensors()
    optimizer = AdamW(lr=0.1, weight_decay=0.0).build(ours)
    reference = torch.optim.AdamW(theirs.values(), lr=0.1, betas=(0.9, 0.95), weight_decay=0.0, foreach=False)
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        guarded_step(optimizer, ONE, ZERO)
        reference.step()
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", OPTIMIZER.kinds())
def test_dividing_by_the_divisor_is_dividing_the_gradients(kind):
    choice = OPTIMIZER[kind](lr=0.1)
    ours, theirs = tensors(), tensors()
    divided, plain = choice.build(ours), choice.build(theirs)
    for step in range(3):
        set_gradients(ours, step, factor=3.0)
        set_gradients(theirs, step)
        guarded_step(divided, torch.tensor(3.0), ZERO)
        guarded_step(plain, ONE, ZERO)
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", OPTIMIZER.kinds())
def test_a_step_with_found_inf_changes_nothing_at_all(kind):
    choice = OPTIMIZER[kind](lr=0.1)
    named = tensors()
    optimizer = choice.build(named)
    choice.allocate(optimizer, named.values())
    set_gradients(named, 1)
    guarded_step(optimizer, ONE, ZERO)
    before = copy.deepcopy((named, optimizer.state_dict()["state"]))
    set_gradients(named, 2)
    named["embedding.weight"].grad[0, 0] = float("nan")
    guarded_step(optimizer, torch.tensor(float("nan")), ONE)
    after = (named, optimizer.state_dict()["state"])
    for name in named:
        assert torch.equal(before[0][name], after[0][name])
    assert step_count(optimizer) == 1
    for i, state in before[1].items():
        assert all(torch.equal(value, after[1][i][key]) for key, value in state.items())


@pytest.mark.parametrize("kind", OPTIMIZER.kinds())
def test_allocated_state_is_the_state_before_the_first_step(kind):
    choice = OPTIMIZER[kind](lr=0.1)
    ours, theirs = tensors(), tensors()
    allocated, fresh = choice.build(ours), choice.build(theirs)
    choice.allocate(allocated, ours.values())
    for name, p in ours.items():
        assert set(choice.states) <= set(allocated.state[p]), name
        assert all(allocated.state[p][s].shape == p.shape for s in choice.states)
    set_gradients(ours, 1)
    set_gradients(theirs, 1)
    guarded_step(allocated, ONE, ZERO)
    guarded_step(fresh, ONE, ZERO)
    assert all(torch.equal(p, theirs[name]) for name, p in ours.items())


def test_the_step_count_can_be_read_and_set():
    named = tensors()
    choice = AdamW(lr=0.1)
    optimizer = choice.build(named)
    assert step_count(optimizer) == 0
    choice.allocate(optimizer, named.values())
    set_step_count(optimizer, 41)
    set_gradients(named, 1)
    guarded_step(optimizer, ONE, ZERO)
    assert step_count(optimizer) == 42


def test_vectors_are_not_decayed_and_the_first_matching_group_wins():
    named = tensors()
    groups = (
        Group(match="*.norm.*", lr_scale=2.0),
        Group(match="layers.*", weight_decay=0.3),
        Group(match="*", lr_scale=9),
    )
    found = {n: (g["weight_decay"], g["lr_scale"]) for g in parameter_groups(named, 0.1, groups) for n in g["names"]}
    assert found == {
        "embedding.weight": (0.1, 9),
        "layers.0.norm.weight": (0.0, 2.0),
        "layers.0.down.weight": (0.3, 1.0),
    }


def test_a_group_may_decay_a_vector():
    found = parameter_groups(tensors(), 0.1, [Group(match="*.norm.weight", weight_decay=0.2)])
    assert {g["weight_decay"]: g["names"] for g in found} == {
        0.1: ["embedding.weight", "layers.0.down.weight"],
        0.2: ["layers.0.norm.weight"],
    }


def test_the_learning_rate_of_a_group_is_scaled():
    optimizer = AdamW(lr=1.0, groups=(Group(match="embedding.*", lr_scale=0.1),)).build(tensors())
    set_lr(optimizer, 0.5)
    assert {g["names"][0]: g["lr"] for g in optimizer.param_groups} == {
        "embedding.weight": 0.05, "layers.0.norm.weight": 0.5, "layers.0.down.weight": 0.5
    }  # fmt: skip


def test_a_pattern_without_a_parameter_is_named():
    choice = AdamW(lr=1.0, groups=(Group(match="embedding.*"), Group(match="*.nrom.*")))
    [sentence] = choice.unmatched(tensors())
    assert sentence.startswith("optimizer.groups.1.match is '*.nrom.*'")


def test_groups_are_read_from_a_run_file():
    group = Node({"match": Node("*.norm.*", "run.yaml:3"), "lr_scale": Node(2, "run.yaml:4")}, "run.yaml:3")
    tree = Node({"lr": Node(1e-3, "run.yaml:1"), "groups": Node([group], "run.yaml:2")}, "run.yaml:1")
    assert build(AdamW, tree)[0] == AdamW(lr=1e-3, groups=(Group(match="*.norm.*", lr_scale=2.0),))


def test_fields_out_of_range_are_refused_by_name():
    wrong = AdamW(lr=-1, betas=(0.9, 1.0), eps=-1, weight_decay=-1, clip=0)
    assert [sentence.split("=")[0] for sentence in wrong.problems()] == ["lr", "betas", "eps", "weight_decay", "clip"]
    assert AdamW(lr=1e-3, clip=None).problems() == []
    assert Group(match="", weight_decay=-1, lr_scale=-1).problems() != []
