"""The norm of a spread gradient against the norm of the whole one."""

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatrain.optim.norm import clip_divisor, counted_and_copies, global_norm, refused, squared_norm
from megatrain.parallel.mesh import Mesh
from megatrain.parallel.shard import Part, Shard, constant
from tests.ranks import run

CPU, ONE = torch.device("cpu"), torch.tensor(1.0)
FULL = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
SHARDS = {  # rank 0 and rank 1 of tp=2: cut with one row of dimension 1 held twice, and a copy
    "cut": [
        Shard((4, 6), constant(0), dim=1, parts=(Part(0, 3), Part(3, 4))),
        Shard((4, 6), constant(0), dim=1, parts=(Part(3, 4, counted=False), Part(4, 6))),
    ],
    "copy": [
        Shard((4, 6), constant(0), parts=(Part(0, 4),)),
        Shard((4, 6), constant(0), parts=(Part(0, 4, counted=False),)),
    ],
}


def norm_over_tp() -> torch.Tensor:
    axis = Mesh.of(tp=2).at(dist.get_rank()).connect().axis("tp")
    found = [counted_and_copies(s[axis.rank], s[axis.rank].cut(FULL)) for s in SHARDS.values()]
    counted, copies = ([piece for pair in found for piece in pair[i]] for i in (0, 1))
    return global_norm(squared_norm(counted, copies, CPU), [axis])


def test_every_element_is_counted_once_over_the_ranks():
    found = run(norm_over_tp, 2)
    torch.testing.assert_close(found[0], (2 * FULL.square().sum()).sqrt(), rtol=1e-6, atol=0)
    assert torch.equal(found[0], found[1])


@given(st.lists(st.lists(st.floats(-(2.0**60), 2.0**60, width=32), max_size=5), max_size=4))
def test_the_norm_of_a_list_of_tensors_is_the_norm_of_their_elements(lists):
    elements = [x for row in lists for x in row]
    found = global_norm(squared_norm([torch.tensor(row) for row in lists], [], CPU), [])
    assert float(found) == pytest.approx(math.hypot(*elements), rel=1e-6, abs=1e-20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("uneven", [0, 3])
def test_the_norm_of_a_million_elements_is_that_in_float64_and_the_same_in_any_pieces(uneven, dtype):
    draw = torch.Generator().manual_seed(1)
    sizes = (uneven * torch.randn(4096, 256, generator=draw)).exp()
    whole = (sizes * torch.randn(4096, 256, generator=draw)).to(dtype)
    exact = float(whole.double().square().sum().sqrt())
    for pieces in ([whole], [whole.T], whole.chunk(2), whole.chunk(3, dim=1), whole.flatten().tensor_split(5)):
        assert float(global_norm(squared_norm(pieces, [], CPU), [])) == pytest.approx(exact, rel=1e-7)


def test_a_large_finite_gradient_is_finite():
    tensors = [torch.full((1,), 1e38), torch.full((1,), 1e38)]
    norm = global_norm(squared_norm(tensors, [], CPU), [])
    assert refused(norm, ONE, math.inf) == 0
    assert float(norm) == pytest.approx(math.sqrt(2) * 1e38)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_element_that_is_not_finite_is_seen(bad):
    x = torch.zeros(1000)
    x[777] = bad
    assert refused(global_norm(squared_norm([torch.zeros(3), x], [], CPU), []), ONE, math.inf) == 1


def test_a_copy_adds_nothing_unless_it_is_not_finite():
    counted = [torch.tensor([3.0, 4.0])]
    assert global_norm(squared_norm(counted, [torch.full((3,), 1e10)], CPU), []) == 5
    norm = global_norm(squared_norm(counted, [torch.tensor([1.0, math.inf])], CPU), [])
    assert refused(norm, ONE, math.inf) == 1


def test_a_step_is_refused_where_its_loss_is_above_the_most_allowed():
    assert [float(refused(ONE, loss, 2.0)) for loss in (ONE, 2 * ONE, 2.5 * ONE)] == [0, 0, 1]


@given(st.floats(0, 1e6, width=32), st.floats(1e-3, 1e3))
def test_a_clipped_gradient_has_at_most_the_limit_and_a_small_one_is_left_alone(norm, limit):
    divisor = float(clip_divisor(torch.tensor(norm), limit))
    assert norm / divisor <= limit * (1 + 1e-6)
    assert divisor == 1 or norm > limit * (1 - 1e-6)


def test_no_limit_leaves_any_gradient_alone():
    assert clip_divisor(torch.tensor(1e30), None) == 1
