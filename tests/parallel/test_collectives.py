"""Each collective and its conjugate on real ranks; alone they do nothing at all."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.parallel import collectives
from megatrain.parallel.mesh import ALONE, Axis, Mesh
from tests.ranks import run

PAIRS = {
    "copy": collectives.copy,
    "reduce": collectives.reduce,
    "gather": collectives.gather,
    "scatter": collectives.scatter,
}


def value(rank: int, salt: int) -> Tensor:
    return torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(10 * salt + rank))


def expected(name: str, given: list[Tensor], rank: int) -> Tensor:
    """What `rank` gets forward when the ranks give these."""
    n = len(given)
    return {
        "copy": lambda: given[rank],
        "reduce": lambda: sum(given[1:], given[0]),
        "gather": lambda: torch.cat(given, 1),
        "scatter": lambda: sum(given[1:], given[0]).chunk(n, 1)[rank],
    }[name]()


CONJUGATE = {"copy": "reduce", "reduce": "copy", "gather": "scatter", "scatter": "gather"}


def forward_and_backward(n: int) -> None:
    axis = Mesh.of(tp=n).at(dist.get_rank()).connect().axis("tp")
    for name, pair in PAIRS.items():
        given = [value(r, 1) for r in range(n)]
        x = given[axis.rank].clone().requires_grad_()
        y = pair(x, axis)
        torch.testing.assert_close(y, expected(name, given, axis.rank), msg=name)
        cotangents = [value(r, 2)[:, :1].expand_as(y).contiguous() + r for r in range(n)]
        y.backward(cotangents[axis.rank])
        torch.testing.assert_close(x.grad, expected(CONJUGATE[name], cotangents, axis.rank), msg=name)


@pytest.mark.parametrize("n", [2, 3])
def test_a_collective_and_its_gradient_are_conjugate(n):
    run(forward_and_backward, n, n)


def own_rows_of() -> Tensor:
    axis = Mesh.of(tp=2).at(dist.get_rank()).connect().axis("tp")
    return collectives.own_rows(torch.arange(12).view(1, 6, 2), axis)


def test_own_rows_are_dealt_in_rank_order():
    assert torch.equal(torch.cat(run(own_rows_of, 2), 1), torch.arange(12).view(1, 6, 2))


def compiled_as_eager() -> None:
    axis = Mesh.of(tp=2).at(dist.get_rank()).connect().axis("tp")

    def both(x: Tensor) -> Tensor:
        return collectives.scatter(collectives.gather(x, axis).sin(), axis)

    x = value(axis.rank, 1).requires_grad_()
    fast = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fast(x), both(x))
    found, exact = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (fast, both))
    torch.testing.assert_close(found, exact)


def test_collectives_stay_in_a_compiled_graph():
    run(compiled_as_eager, 2)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_on_an_axis_of_one_nothing_happens(pair):
    x = torch.ones(1, 2, 3)
    assert pair(x, ALONE) is x
    assert pair(x, Axis("tp")) is x
    assert collectives.own_rows(x, ALONE) is x
