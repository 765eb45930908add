"""Optimisers against torch's own plain loops; groups by pattern; steps that clip or change nothing."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from megatrain.base.optional import nvidia_apex, torchao
from megatrain.config.build import build
from megatrain.config.source import Node
from megatrain.optim.kinds.adafactor import Adafactor
from megatrain.optim.kinds.adamw import AdamW
from megatrain.optim.kinds.adamw_8bit import AdamW8bit
from megatrain.optim.kinds.lion import Lion
from megatrain.optim.kinds.muon import Muon
from megatrain.optim.optimizer import (
    OPTIMIZER,
    Group,
    guarded,
    parameter_groups,
    set_lr,
    set_step_count,
    step_count,
)
from megatrain.optim.steps import Steps
from megatrain.optim.whole import Held
from megatrain.parallel.mesh import ALONE
from megatrain.parallel.shard import Part, Shard, normal

ONE, ZERO = torch.tensor(1.0), torch.tensor(0.0)


def guarded_step(optimizer, divisor, found_inf):
    with guarded(optimizer, divisor, found_inf):
        optimizer.step()


def tensors(*, device: str = "cpu") -> dict[str, nn.Parameter]:
    g = torch.Generator().manual_seed(5)
    shapes = {"embedding.weight": (7, 4), "layers.0.norm.weight": (4,), "layers.0.down.weight": (4, 3)}
    return {name: nn.Parameter(torch.randn(shape, generator=g).to(device)) for name, shape in shapes.items()}


def shards_of(named) -> dict[str, Shard]:
    return {n: Shard(tuple(p.shape), normal(1.0), parts=(Part(0, p.shape[0]),)) for n, p in named.items()}


def settle(optimizer: Steps, named, copies=None) -> None:
    """As an engine of one rank does."""
    shards = shards_of(named)
    optimizer.settle([Held(n, p, shards[n], 0, p.numel()) for n, p in named.items()], shards, ALONE, copies)


def settled(choice, named) -> Steps:
    optimizer = choice.build(named)
    settle(optimizer, named)
    return optimizer


def set_gradients(named, step: int, factor: float = 1.0) -> None:
    g = torch.Generator().manual_seed(step)
    for p in named.values():
        p.grad = (torch.randn(p.shape, generator=g) * factor).to(p.device)


class AmpC:
    """Stands for apex's extension: what its kernel does (csrc/multi_tensor_adam.cu), element by element."""

    @staticmethod
    def multi_tensor_adam_capturable(
        chunk, noop, lists, lr, beta1, beta2, eps, step, mode, correct, decay, inverse_scale
    ):
        assert chunk > 0
        assert mode == 1
        assert noop.dtype == step.dtype == torch.int32
        assert lr.dtype == inverse_scale.dtype == torch.float32
        if noop.item() == 1:
            return
        one, two = (1 - beta**step if correct else 1.0 for beta in (beta1, beta2))
        for g, p, m, v in zip(*lists, strict=True):
            g.mul_(inverse_scale)
            m.mul_(beta1).add_((1 - beta1) * g)
            v.mul_(beta2).add_((1 - beta2) * g * g)
            p.sub_(lr * ((m / one) / ((v / two).sqrt() + eps) + decay * p))


def test_adamw_by_apex_is_adamw_by_torch(monkeypatch):
    """A step that is refused among them, and gradients to be divided."""
    choice = AdamW(lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2)
    ours, theirs = tensors(), tensors()
    ours_steps, theirs_steps = choice.build(ours), choice.build(theirs)
    for step in range(1, 7):
        for named in (ours, theirs):
            set_gradients(named, step)
        divisor, refused = torch.tensor(1.5), ONE if step == 3 else ZERO
        guarded_step(theirs_steps, divisor, refused)
        with monkeypatch.context() as patch:
            patch.setattr(AdamW, "update_by_torch", lambda self, work: self.update_by_apex(work, AmpC))
            guarded_step(ours_steps, divisor, refused)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)
    assert step_count(ours_steps) == step_count(theirs_steps) == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_adamw_on_a_gpu_is_adamw_on_a_cpu_and_so_are_bf16_copies():
    print(nvidia_apex("amp_C").why_not or "by apex")
    choice = AdamW(lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2)
    for device in ("cpu", "cuda"):
        named = tensors(device=device)
        copies = {p: p.detach().bfloat16() for p in named.values()}
        optimizer = choice.build(named)
        settle(optimizer, named, copies)
        for step in range(1, 6):
            set_gradients(named, step)
            guarded_step(optimizer, ONE.to(device), ZERO.to(device))
        if device == "cpu":
            expected = named
    for name, p in named.items():
        torch.testing.assert_close(p.cpu(), expected[name], rtol=1e-6, atol=1e-7)
        assert torch.equal(copies[p], p.bfloat16())


@pytest.mark.parametrize("choice", [AdamW(lr=0.1), Lion(lr=0.1)])
def test_bf16_copies_follow_the_tensors_that_a_step_changes_and_stay_where_it_is_refused(choice):
    named = tensors()
    copies = {p: torch.zeros_like(p.detach()).bfloat16() for p in named.values()}
    optimizer = choice.build(named)
    settle(optimizer, named, copies)
    for step, refused in ((1, ZERO), (2, ONE)):
        set_gradients(named, step)
        before = {name: p.detach().clone() for name, p in named.items()}
        guarded_step(optimizer, ONE, refused)
        for name, p in named.items():
            assert torch.equal(p, before[name]) == bool(refused)
            assert torch.equal(copies[p], p.bfloat16())


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


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            AdamW(lr=0.1, weight_decay=0.1),
            lambda named: torch.optim.AdamW(named, lr=0.1, betas=(0.9, 0.95), weight_decay=0.1, foreach=False),
        ),
        (
            Adafactor(lr=0.02, weight_decay=0.1),
            lambda named: torch.optim.Adafactor(named, lr=0.02, weight_decay=0.1, foreach=False),
        ),
        (
            Muon(lr=0.01, product="bf16", leave=()),
            lambda named: torch.optim.Muon(named, lr=0.01, adjust_lr_fn="match_rms_adamw"),
        ),
        (
            Muon(lr=0.01, product="bf16", leave=(), scale="original", nesterov=False),
            lambda named: torch.optim.Muon(named, lr=0.01, nesterov=False),
        ),
    ],
    ids=["adamw", "adafactor", "muon", "muon-original"],
)
def test_fifty_steps_are_those_of_torch(ours, theirs):
    mine, other = tensors(), tensors()
    if ours.kind != "adafactor":  # torch's Muon takes no vectors, and ours decays none of them
        mine, other = ({n: p for n, p in named.items() if p.ndim > 1} for named in (mine, other))
    optimizer = settled(dataclasses.replace(ours, groups=(Group(match="*", weight_decay=ours.weight_decay),)), mine)
    reference = theirs(list(other.values()))
    for step in range(50):
        set_gradients(mine, step)
        set_gradients(other, step)
        guarded_step(optimizer, ONE, ZERO)
        reference.step()
    for name, p in mine.items():
        torch.testing.assert_close(p, other[name], rtol=1e-6, atol=1e-6)


def lion_as_published(w, m, g):
    """Program 1 of the paper."""
    update = torch.sign(0.9 * m + 0.1 * g)
    return w - 0.01 * (update + 0.1 * w), 0.99 * m + 0.01 * g


def muon_written_out(w, m, g):
    """In float64, momentum as torch has it, by the singular value decomposition's polynomial."""
    m = 0.95 * m + 0.05 * g
    left, values, right = torch.linalg.svd(0.05 * g + 0.95 * m, full_matrices=False)
    x = values / values.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    update = left @ torch.diag(x) @ right * 0.2 * max(g.shape) ** 0.5
    return w - 0.01 * 0.1 * w - 0.01 * update, m


@pytest.mark.parametrize(
    ("choice", "formula"), [(Lion(lr=0.01), lion_as_published), (Muon(lr=0.01, leave=()), muon_written_out)]
)
def test_fifty_steps_are_those_of_the_paper_in_float64(choice, formula):
    named = {n: p for n, p in tensors().items() if p.ndim > 1}
    twins = {n: (p.detach().double(), torch.zeros(p.shape).double()) for n, p in named.items()}
    optimizer = settled(choice, named)
    for step in range(50):
        set_gradients(named, step)
        twins = {n: formula(w, m, named[n].grad.double()) for n, (w, m) in twins.items()}
        guarded_step(optimizer, ONE, ZERO)
    for name, p in named.items():
        torch.testing.assert_close(p.detach().double(), twins[name][0], rtol=1e-6, atol=1e-6)


def test_fifty_steps_with_8_bit_moments_are_those_of_torchao(monkeypatch):
    theirs_of = torchao("optim").AdamW8bit
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    g = torch.Generator().manual_seed(5)
    ours = {
        "large": nn.Parameter(torch.randn(64, 128, generator=g)),
        "small": nn.Parameter(torch.randn(9, generator=g)),
    }
    theirs = copy.deepcopy(ours)
    optimizer = settled(AdamW8bit(lr=0.01, groups=(Group(match="*", weight_decay=0.1),)), ours)
    reference = theirs_of(theirs.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(50):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        guarded_step(optimizer, ONE, ZERO)
        reference.step()
    assert optimizer.state[ours["large"]]["exp_avg"].dtype == torch.uint8
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], rtol=1e-6, atol=1e-6)


def test_8_bit_moments_come_back_from_a_checkpoint_bit_for_bit():
    named = {"w": nn.Parameter(torch.randn(50, 130, generator=torch.Generator().manual_seed(1)))}
    choice = AdamW8bit(lr=0.01)
    optimizer, again = settled(choice, named), settled(choice, copy.deepcopy(named))
    for step in range(3):
        set_gradients(named, step)
        guarded_step(optimizer, ONE, ZERO)
    saved = {(s.state, s.name, s.box): s.values.clone() for s in optimizer.slices()}
    again.load(lambda s: s.values.copy_(saved[s.state, s.name, s.box]), lambda state: True)
    (before,), (after,) = optimizer.state.values(), again.state.values()
    for key in before.keys() - {"step"}:
        assert torch.equal(before[key], after[key]), key


def test_fused_matrices_are_orthogonalised_piece_by_piece():
    g = torch.Generator().manual_seed(2)
    values, gradient = torch.randn(12, 4, generator=g), torch.randn(12, 4, generator=g)
    parts = (Part(0, 6), Part(6, 9), Part(9, 12))
    fused = {"qkv": nn.Parameter(values.clone())}
    apart = {str(i): nn.Parameter(values[p.start : p.stop].clone()) for i, p in enumerate(parts)}
    choice = Muon(lr=0.1)
    steps = choice.build(fused)
    shard = Shard((12, 4), normal(1.0), parts=parts)
    steps.settle([Held("qkv", fused["qkv"], shard, 0, 48)], {"qkv": shard}, ALONE)
    fused["qkv"].grad = gradient
    for i, p in enumerate(parts):
        apart[str(i)].grad = gradient[p.start : p.stop]
    guarded_step(steps, ONE, ZERO)
    guarded_step(settled(choice, apart), ONE, ZERO)
    assert torch.equal(fused["qkv"], torch.cat(list(apart.values())))


def test_muon_leaves_vectors_embeddings_and_the_head_to_its_rest():
    named = tensors() | {"head.weight": nn.Parameter(torch.randn(7, 4))}
    optimizer = Muon(lr=0.1, rest=Lion(lr=0.01)).build(named)
    kinds = {name: rule.kind for name, rule in optimizer.rules.items()}
    assert kinds == {
        "embedding.weight": "lion", "head.weight": "lion", "layers.0.norm.weight": "lion",
        "layers.0.down.weight": "muon",
    }  # fmt: skip
    set_lr(optimizer, 0.5)
    lrs = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert lrs["layers.0.down.weight"] == 0.5
    assert lrs["head.weight"] == pytest.approx(0.05)


@pytest.mark.parametrize("kind", OPTIMIZER.kinds())
def test_dividing_by_the_divisor_is_dividing_the_gradients(kind):
    choice = OPTIMIZER[kind](lr=0.1)
    ours, theirs = tensors(), tensors()
    divided, plain = settled(choice, ours), settled(choice, theirs)
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
    settle(optimizer, named)
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


def two_of(kind):
    """Two optimisers of the same beginning, each with its tensors."""
    pairs = []
    for named in (tensors(), tensors()):
        optimizer = OPTIMIZER[kind](lr=0.1).build(named)
        settle(optimizer, named)
        pairs.append((optimizer, named))
    return pairs


@pytest.mark.parametrize("kind", OPTIMIZER.kinds())
def test_a_first_step_with_found_inf_changes_nothing_either(kind):
    (skipping, ours), (straight, theirs) = two_of(kind)
    set_gradients(ours, 1)
    ours["embedding.weight"].grad[0, 0] = float("nan")
    guarded_step(skipping, torch.tensor(float("nan")), ONE)
    assert all(torch.equal(p, theirs[name]) for name, p in ours.items())
    for optimizer, named in ((skipping, ours), (straight, theirs)):
        set_gradients(named, 2)
        guarded_step(optimizer, ONE, ZERO)
    assert all(torch.equal(p, theirs[name]) for name, p in ours.items())


@pytest.mark.parametrize("kind", OPTIMIZER.kinds())
def test_allocated_state_is_the_state_before_the_first_step(kind):
    (allocated, ours), (fresh, theirs) = two_of(kind)
    before = {(s.state, s.name): s.values.clone() for s in allocated.slices()}
    assert before.keys() == {(s.state, s.name) for s in fresh.slices()}
    assert all((values == 0).all() for values in before.values())
    for steps, named in ((allocated, ours), (fresh, theirs)):
        set_gradients(named, 1)
        guarded_step(steps, ONE, ZERO)
    assert all(torch.equal(p, theirs[name]) for name, p in ours.items())


def test_the_step_count_can_be_read_and_set():
    named = tensors()
    choice = AdamW(lr=0.1)
    optimizer = choice.build(named)
    assert step_count(optimizer) == 0
    settle(optimizer, named)
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
    shadowed = AdamW(lr=1.0, groups=(Group(match="*"), Group(match="*.norm.*", lr_scale=50.0)))
    [sentence] = shadowed.unmatched(tensors())
    assert "optimizer.groups.1.match is '*.norm.*', and groups before it take all of that" in sentence


def test_groups_are_read_from_a_run_file():
    group = Node({"match": Node("*.norm.*", "run.yaml:3"), "lr_scale": Node(2, "run.yaml:4")}, "run.yaml:3")
    tree = Node({"lr": Node(1e-3, "run.yaml:1"), "groups": Node([group], "run.yaml:2")}, "run.yaml:1")
    assert build(AdamW, tree)[0] == AdamW(lr=1e-3, groups=(Group(match="*.norm.*", lr_scale=2.0),))


def test_fields_out_of_range_are_refused_by_name():
    wrong = AdamW(lr=-1, betas=(0.9, 1.0), eps=-1, weight_decay=-1, clip=0)
    assert [sentence.split("=")[0] for sentence in wrong.problems()] == ["lr", "weight_decay", "clip", "betas", "eps"]
    assert AdamW(lr=1e-3, clip=None).problems() == []
    assert Group(match="", weight_decay=-1, lr_scale=-1).problems() != []


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (Muon(lr=0.0, rest=Lion(lr=0.1)), "lr=0 stops rest too"),
        (Muon(lr=0.1, rest=Lion(lr=0.1, clip=1e-9)), "rest.clip=1e-09 has no effect"),
        (AdamW(lr=0.1, eps=0.0), "eps=0.0 must be above 0"),
        (Adafactor(lr=0.1, eps=-1.0), "eps=-1.0 must be above 0"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(choice, words):
    assert words in " ".join(choice.problems())


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (Muon(lr=0.1, leave=("*",)), "leaves Muon no matrix"),
        (Muon(lr=0.1, leave=("*feedforward*",)), "optimizer.leave has '*feedforward*', which is the name of no"),
        (Muon(lr=0.1, groups=(Group(match="embedding*"),), rest=Lion(lr=0.1)), "which is all left to rest"),
        (Muon(lr=0.1, groups=(Group(match="*norm*"),), rest=Lion(lr=0.1)), "which is all left to rest"),
        (Muon(lr=0.1, rest=Lion(lr=0.1, groups=(Group(match="*.down.*"),))), "which is all Muon's own"),
    ],
)
def test_patterns_of_muon_that_leave_it_nothing_are_refused(choice, words):
    assert words in " ".join(choice.unmatched(tensors()))
    assert not Muon(lr=0.1, rest=Lion(lr=0.1)).unmatched(tensors())


def test_the_moments_of_muons_rest_are_told():
    assert Muon(lr=0.1).moments == "fp32"
    assert "8" in Muon(lr=0.1, rest=AdamW8bit(lr=0.1)).moments
