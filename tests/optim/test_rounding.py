"""Stochastic rounding: exact in the mean, the same bits in every layout, and steps that plain rounding would lose."""

import math

import pytest
import torch
from torch import nn

from megatrain.optim.kinds.adamw import AdamW
from megatrain.optim.rounding import elements, round_stochastically, rounded
from megatrain.optim.steps import Steps
from megatrain.optim.whole import Held
from megatrain.parallel.mesh import ALONE
from megatrain.parallel.shard import Part, Shard, normal

N = 10_000


def held(name: str, tensor: torch.Tensor, shard: Shard | None = None, start: int = 0) -> Held:
    shard = shard or Shard(tuple(tensor.shape), normal(1.0), parts=(Part(0, tensor.shape[0]),))
    return Held(name, tensor, shard, start, tensor.numel())


@pytest.mark.parametrize("value", [1.0, 1.001, -1.003, 3.14159, 1e-30, 300.7, -0.0])
def test_the_mean_of_ten_thousand_roundings_is_within_three_standard_errors(value):
    x = torch.full((N,), value)
    found = round_stochastically(x, x.bfloat16(), torch.tensor(1.0), [held("w", x)]).double()
    below, above = found.min(), found.max()
    exact = float(x[0])
    chance = 0.0 if above == below else (exact - below) / (above - below)
    error = float(above - below) * math.sqrt(chance * (1 - chance) / N)
    assert abs(found.mean() - exact) <= 3 * error + 1e-12 * abs(exact)
    assert below <= exact <= above
    assert len(found.unique()) == (1 if float(x.bfloat16()[0]) == exact else 2)


def test_what_bf16_can_hold_and_what_is_not_finite_stays():
    x = torch.tensor([1.5, -2.0, 0.0, math.inf, -math.inf, math.nan, 3.3895e38])
    out = rounded(x, torch.full(x.shape, 0xFFFF))
    assert torch.equal(out[:5].float(), x[:5])
    assert out[5].isnan()


def test_rounding_depends_on_step_and_name_and_element_and_not_on_the_layout():
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    was = torch.zeros_like(x).bfloat16()
    whole = held("w", x)
    one = round_stochastically(x, was, torch.tensor(1.0), [whole])
    assert torch.equal(one, round_stochastically(x, was, torch.tensor(1.0), [whole]))
    assert not torch.equal(one, round_stochastically(x, was, torch.tensor(2.0), [whole]))
    assert not torch.equal(one, round_stochastically(x, was, torch.tensor(1.0), [held("v", x)]))
    columns = Shard((8, 6), normal(1.0), dim=1, parts=(Part(2, 4),))
    part = x[:, 2:4].contiguous()
    again = round_stochastically(part, part.bfloat16(), torch.tensor(1.0), [held("w", part, columns)])
    assert torch.equal(again, one[:, 2:4])
    flat = x.view(-1)[7:40].clone()
    again = round_stochastically(flat, flat.bfloat16(), torch.tensor(1.0), [held("w", flat, whole.shard, 7)])
    assert torch.equal(again, one.view(-1)[7:40])
    assert elements(held("w", part, columns), x.device).tolist() == [6 * i + j for i in range(8) for j in (2, 3)]


def regression(kind: str) -> float:
    """Final loss of a linear regression by small steps, weights kept in `kind`."""
    g = torch.Generator().manual_seed(1)
    x, target = torch.randn(256, 32, generator=g), 4 + 0.5 * torch.randn(32, generator=g)
    y = x @ target
    p = nn.Parameter(torch.full((32,), 4.0).to(torch.float32 if kind == "fp32" else torch.bfloat16))
    p.grad_dtype = torch.float32
    choice = AdamW(lr=3e-3, weight_decay=0.0, betas=(0.9, 0.95))
    steps: Steps = choice.build({"w": p})
    one = held("w", p)
    steps.settle([one], {"w": one.shard}, ALONE)
    for _ in range(1000):
        p.grad = None
        (x @ p.float() - y).square().mean().backward()
        if kind == "plain rounding":
            wide = nn.Parameter(p.detach().float())
            wide.grad = p.grad
            choice.update(_work(choice, steps, p, wide))
            p.data.copy_(wide.data)
        else:
            steps.step()
    return float((x @ p.float() - y).square().mean().detach())


def _work(choice: AdamW, steps: Steps, p: nn.Parameter, wide: nn.Parameter):
    from megatrain.optim.steps import Step, Work

    step = Step(choice.lr, 0.0, torch.ones(()), torch.zeros(()))
    return Work(["w"], [wide], [steps.state[p]], {}, step, None, {}, [])


def test_pure_bf16_follows_float32_where_plain_rounding_stalls():
    exact, stochastic, plain = (regression(kind) for kind in ("fp32", "bf16", "plain rounding"))
    assert exact < 1e-3
    assert stochastic < 0.1
    assert plain > 1
