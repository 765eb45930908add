"""Linear layers and the embedding cut over ranks against the undivided ones."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.base.errors import LayoutError
from megatrain.parallel import product
from megatrain.parallel.collectives import own_rows
from megatrain.parallel.embedding import VocabParallelEmbedding
from megatrain.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatrain.parallel.mesh import Axis, Mesh
from megatrain.parallel.product import linear
from megatrain.parallel.shard import initialise, normal, shard_of
from megatrain.parallel.tensor import TensorParallel
from tests.contract import assert_near, leaf, randomise
from tests.ranks import run

D_IN, PIECES, D_OUT = 12, (6, 6, 6), 12


def pair(tp: TensorParallel) -> nn.ModuleList:
    """A column- and a row-parallel layer, one behind the other; the first makes three outputs in one."""
    first = ColumnParallelLinear(D_IN, sum(PIECES), tp, init=normal(0.3), pieces=PIECES, bias=True)
    return nn.ModuleList([first, RowParallelLinear(PIECES[0], D_OUT, tp, init=normal(0.3), bias=True)])


def through(layers: nn.ModuleList, x: Tensor) -> Tensor:
    a, b, c = layers[0](x).chunk(3, -1)
    return layers[1](a.tanh() * b + c)


def cut_against_whole(n: int) -> int:
    axis = Mesh.of(tp=n).at(dist.get_rank()).connect().axis("tp")
    for sequence in (False, True):
        linear_against_whole(axis, sequence)
        n_rows = embedding_against_whole(axis, sequence)
    return n_rows


def linear_against_whole(axis: Axis, sequence: bool) -> None:
    tp = TensorParallel(axis, sequence)
    whole, local = pair(TensorParallel()), pair(tp)
    initialise(whole, seed=1)
    initialise(local, seed=1)
    randomise_biases(whole, local)
    own = own_rows if sequence else lambda t, _: t
    x, cotangent = leaf(2, 6, D_IN), leaf(2, 6, D_OUT, seed=4).detach()
    exact = through(whole, x)
    grads = torch.autograd.grad(exact, [x, *whole.parameters()], cotangent)
    x_here = own(x, axis).detach().requires_grad_()
    y = through(local, x_here)
    assert_near(y, own(exact, axis))
    found = torch.autograd.grad(y, [x_here, *local.parameters()], own(cotangent, axis))
    assert_near(found[0], own(grads[0], axis))
    for p, grad, expected in zip(local.parameters(), found[1:], grads[1:], strict=True):
        if shard_of(p).summed_over_tp:
            dist.all_reduce(grad, group=axis.group)
        assert_near(grad, shard_of(p).cut(expected))


def randomise_biases(whole: nn.Module, local: nn.Module) -> None:
    with torch.no_grad():
        for p, full in zip(local.parameters(), whole.parameters(), strict=True):
            if full.ndim == 1:
                full.copy_(torch.arange(len(full)) / len(full))
                p.copy_(shard_of(p).cut(full))


@pytest.mark.parametrize("n", [2, 3])
def test_cut_layers_give_the_outputs_and_gradients_of_whole_ones(n):
    held = run(cut_against_whole, n, n)
    assert sum(held) == VOCAB_SIZE  # which does not divide
    assert max(held) - min(held) == 1


def test_alone_they_are_plain_linear_layers():
    layers = pair(TensorParallel())
    randomise(layers)
    x = leaf(2, 3, D_IN)
    assert torch.equal(layers[0](x), F.linear(x, layers[0].weight, layers[0].bias))
    y = leaf(2, 3, PIECES[0])
    assert torch.equal(layers[1](y), F.linear(y, layers[1].weight, layers[1].bias))


def test_a_product_of_another_kind_is_used():
    tp = TensorParallel()
    doubled = ColumnParallelLinear(4, 4, tp, init=normal(1.0), product=lambda x, w, b: 2 * F.linear(x, w, b))
    initialise(doubled, seed=0)
    x = leaf(1, 2, 4)
    torch.testing.assert_close(doubled(x), 2 * F.linear(x, doubled.weight))


def test_a_piece_that_does_not_divide_is_refused():
    tp = TensorParallel(Axis("tp", 4))
    with pytest.raises(LayoutError, match=r"=6 cannot be split over tp=4: pick tp from \[1, 2, 3, 6\]"):
        ColumnParallelLinear(4, 14, tp, init=normal(1.0), pieces=(8, 6))


# ------------------------------------------------------------------------------------------------ embedding

VOCAB_SIZE = 7
TOKENS = torch.tensor([[0, 6, 3, 3, 5, 1], [2, 4, 6, 0, 1, 6]])


def embedding_against_whole(axis: Axis, sequence: bool) -> int:
    whole = VocabParallelEmbedding(VOCAB_SIZE, 4, TensorParallel(), init=normal(1.0))
    local = VocabParallelEmbedding(VOCAB_SIZE, 4, TensorParallel(axis, sequence), init=normal(1.0))
    initialise(whole, seed=1)
    initialise(local, seed=1)
    own = own_rows if sequence else lambda t, _: t
    exact, found = whole(TOKENS), local(TOKENS)
    assert torch.equal(found, own(exact, axis))
    cotangent = leaf(2, 6, 4).detach()
    exact.backward(cotangent)
    found.backward(own(cotangent, axis))
    assert_near(local.weight.grad, shard_of(local.weight).cut(whole.weight.grad))
    return local.weight.shape[0]


@pytest.mark.parametrize(("n", "size"), [(7, 3), (8, 8), (50_257, 8), (5, 4)])
def test_rows_are_dealt_without_gap_and_no_rank_goes_empty(n, size):
    ranges = [TensorParallel(Axis("tp", size, rank)).rows(n) for rank in range(size)]
    assert [r[0] for r in ranges] == [0, *(r[1] for r in ranges[:-1])]
    assert ranges[-1][1] == n
    assert all(start < stop for start, stop in ranges)


# ------------------------------------------------------------------------------------------------ overlapped


def column_twice() -> None:
    """The overlapped product and the plain one behind a collective: same bits, also under autocast and compiled."""
    product.CPU_MULTIPLIES_BF16 = True  # so that this CPU takes the path of others, and of a GPU
    axis = Mesh.of(tp=2).at(dist.get_rank()).connect().axis("tp")
    for sequence in (False, True):
        for bias in (False, True):
            for low in (False, True):
                tp = TensorParallel(axis, sequence)
                overlapped = ColumnParallelLinear(D_IN, sum(PIECES), tp, init=normal(0.3), pieces=PIECES, bias=bias)
                initialise(overlapped, seed=1)
                parameters = list(overlapped.parameters())
                x = leaf(2, 4, D_IN)
                autocast = torch.autocast("cpu", torch.bfloat16, enabled=low)
                with autocast:
                    y = overlapped(x)
                    exact = linear(tp.enter(x), overlapped.weight, overlapped.bias)
                cotangent = leaf(*y.shape, seed=4).detach().to(y.dtype)
                expected = torch.autograd.grad(exact, [x, *parameters], cotangent)
                assert torch.equal(y, exact)
                for a, b in zip(torch.autograd.grad(y, [x, *parameters], cotangent), expected, strict=True):
                    assert torch.equal(a, b)
                    assert a.dtype == b.dtype
                fast = torch.compile(overlapped.forward, fullgraph=True, backend="aot_eager")
                with autocast:
                    y = fast(x)
                for a, b in zip(torch.autograd.grad(y, [x, *parameters], cotangent), expected, strict=True):
                    assert_near(a, b, 2e-2 if low else None)


def test_collectives_that_run_beside_products_change_no_bit():
    run(column_twice, 2)
