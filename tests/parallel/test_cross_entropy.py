"""The chunked head and loss against all logits at once."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.parallel import cross_entropy
from megatrain.parallel.cross_entropy import linear_cross_entropy, reference
from megatrain.parallel.mesh import ALONE, Mesh
from megatrain.parallel.tensor import TensorParallel
from tests.contract import TOLERANCE, assert_near, leaf
from tests.ranks import run

N, D = 11, 8


def inputs(n_rows: int, n_valid: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [n, d], the whole head [n_rows, d], targets [n] and weights [n]; two tokens do not count."""
    g = torch.Generator().manual_seed(3)
    targets = torch.randint(n_valid, (N,), generator=g)
    targets[:2] = torch.tensor([0, n_valid - 1])
    weights = torch.rand(N, generator=g) + 0.5
    weights[[4, N - 1]] = 0
    return leaf(N, D, seed=1, dtype=dtype), leaf(n_rows, D, seed=2, dtype=dtype), targets, weights


def chunks_of(rows: int, n_valid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", rows * 4 * n_valid)


@pytest.mark.parametrize("rows", [1, 2, 5, N - 1, N, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_chunk_gives_the_loss_and_gradients_of_the_whole(rows, dtype, monkeypatch):
    chunks_of(rows, 23, monkeypatch)
    monkeypatch.setattr(cross_entropy, "CACHE_BYTES", 3 * 4 * 23)
    hidden, head, targets, weights = inputs(23, 23, dtype)
    found = linear_cross_entropy(hidden, head, targets, weights, axis=ALONE, first=0, n_valid=23)
    exact = reference(hidden.double(), head.double(), targets, weights.double(), n_valid=23)
    assert found.dtype == torch.float32
    assert_near(found, exact, TOLERANCE[dtype])
    scale = 0.37  # the loss is divided by a token count before backward
    for a, b in zip(
        torch.autograd.grad(found * scale, [hidden, head]),
        torch.autograd.grad(exact * scale, [hidden, head]),
        strict=True,
    ):
        assert a.dtype == dtype
        assert_near(a, b)


def test_under_autocast_products_are_bf16_and_the_sum_is_float32():
    hidden, head, targets, weights = inputs(23, 23)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(hidden, head, targets, weights, axis=ALONE, first=0, n_valid=23)
    rounded = [t.detach().bfloat16().float().requires_grad_() for t in (hidden, head)]
    exact = reference(*rounded, targets, weights, n_valid=23)
    assert_near(found, exact, 2e-2)
    found.backward()
    exact.backward()
    assert hidden.grad.dtype == head.grad.dtype == torch.float32
    assert_near(hidden.grad, rounded[0].grad, 2e-2)
    assert_near(head.grad, rounded[1].grad, 2e-2)


def test_z_loss_is_in_the_gradient_and_not_in_the_value():
    hidden, head, targets, weights = inputs(29, 23)
    plain, found = (
        linear_cross_entropy(hidden, head, targets, weights, axis=ALONE, first=0, n_valid=23, z_loss=z)
        for z in (0.0, 0.05)
    )
    assert torch.equal(plain, found)
    exact = reference(hidden.double(), head.double(), targets, weights.double(), n_valid=23, z_loss=0.05)
    for a, b, c in zip(*(torch.autograd.grad(x, [hidden, head]) for x in (found, exact, plain)), strict=True):
        assert_near(a, b)
        assert not torch.allclose(a, c, rtol=1e-2)


def test_padding_rows_of_the_head_take_no_part_and_get_no_gradient():
    hidden, head, targets, weights = inputs(29, 23)
    with torch.no_grad():
        head[23:] = 1e4  # would win every softmax
    found = linear_cross_entropy(hidden, head, targets, weights, axis=ALONE, first=0, n_valid=23)
    assert_near(found, reference(hidden, head, targets, weights, n_valid=23))
    found.backward()
    assert torch.equal(head.grad[23:], torch.zeros(6, D))
    assert head.grad[:23].abs().sum(-1).min() > 0


def test_tokens_without_weight_get_no_gradient():
    hidden, head, targets, weights = inputs(23, 23)
    linear_cross_entropy(hidden, head, targets, weights, axis=ALONE, first=0, n_valid=23).backward()
    gone = weights == 0
    assert torch.equal(hidden.grad[gone], torch.zeros(2, D))
    assert hidden.grad[~gone].abs().sum(-1).min() > 0


def test_equal_logits_cost_the_logarithm_of_the_vocabulary():
    _, _, targets, weights = inputs(23, 23)
    flat = torch.zeros(23, D)
    found = linear_cross_entropy(torch.ones(N, D), flat, targets, weights, axis=ALONE, first=0, n_valid=23)
    torch.testing.assert_close(found, torch.log(torch.tensor(23.0)) * weights.sum())


def test_large_logits_do_not_overflow():
    hidden, head, targets, weights = inputs(23, 23)
    found = linear_cross_entropy(1000 * hidden, head, targets, weights, axis=ALONE, first=0, n_valid=23)
    found.backward()
    assert found.isfinite()
    assert hidden.grad.isfinite().all()


def test_without_gradients_none_are_made():
    hidden, head, targets, weights = inputs(23, 23)
    with torch.no_grad():
        found = linear_cross_entropy(hidden, head, targets, weights, axis=ALONE, first=0, n_valid=23)
    assert not found.requires_grad
    assert_near(found, reference(hidden, head, targets, weights, n_valid=23))


def test_what_is_left_of_a_likely_target_survives_in_bf16():
    """Of a token that the model is sure of the gradient is smaller than a step of bf16 beside the exponential of 1."""
    head = torch.zeros(23, D)
    head[5] = 1.0
    hidden = torch.full((1, D), 1.25)  # a logit of 10 for the target and of 0 for the others
    given = [x.bfloat16().requires_grad_() for x in (hidden, head)]
    one, target = torch.ones(1), torch.tensor([5])
    found = linear_cross_entropy(*given, target, one, axis=ALONE, first=0, n_valid=23)
    exact = [x.detach().double().requires_grad_() for x in given]
    expected = reference(*exact, target, one.double(), n_valid=23)
    assert float(expected.detach()) < 0.002
    for a, b in zip(torch.autograd.grad(found, given), torch.autograd.grad(expected, exact), strict=True):
        assert_near(a, b, 2**-7)


def test_a_frozen_head_leaves_the_gradient_of_hidden_states_alone():
    hidden, head, targets, weights = inputs(23, 23)
    found = linear_cross_entropy(hidden, head.detach(), targets, weights, axis=ALONE, first=0, n_valid=23)
    exact = reference(hidden, head.detach(), targets, weights, n_valid=23)
    assert_near(torch.autograd.grad(found, hidden)[0], torch.autograd.grad(exact, hidden)[0])


# ------------------------------------------------------------------------------------------------ cut over ranks

CASES = [(24, 24, 100), (23, 23, 100), (23, 23, 3), (29, 23, 2), (32, 9, 4)]
"""(rows of the head, vocabulary, rows of a chunk); in the last case some ranks hold padding alone."""


def cut_against_whole(n: int) -> None:
    axis = Mesh.of(tp=n).at(dist.get_rank()).connect().axis("tp")
    tp = TensorParallel(axis)
    for n_rows, n_valid, chunk in CASES:
        for autocast, z_loss in ((False, 0.0), (True, 0.0), (False, 0.1)):
            cross_entropy.CHUNK_BYTES, cross_entropy.CACHE_BYTES = chunk * 4 * n_valid // n, 2 * 4 * n_valid // n
            hidden, head, targets, weights = inputs(n_rows, n_valid)
            first, stop = tp.rows(n_rows)
            local = head.detach()[first:stop].clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found = linear_cross_entropy(
                    tp.enter(hidden), local, targets, weights, axis=axis, first=first, n_valid=n_valid, z_loss=z_loss
                )
            tolerance = 2e-2 if autocast else 3e-6
            assert_near(found, reference(hidden, head, targets, weights, n_valid=n_valid), tolerance)
            exact = reference(hidden, head, targets, weights, n_valid=n_valid, z_loss=z_loss)
            grad_hidden, grad_local = torch.autograd.grad(found, [hidden, local])
            exact_hidden, exact_head = torch.autograd.grad(exact, [hidden, head])
            assert_near(grad_hidden, exact_hidden, tolerance)
            assert_near(grad_local, exact_head[first:stop], tolerance, at_least=0.1)


@pytest.mark.parametrize("n", [2, 3])
def test_a_head_cut_over_ranks_gives_the_loss_and_gradients_of_the_whole(n):
    run(cut_against_whole, n, n)
