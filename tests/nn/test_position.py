"""Every registered position scheme against its definition; rotary: only the distance counts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.nn.position import POSITION
from megatrain.nn.position.rotary import Rotary
from megatrain.parallel.tensor import TensorParallel
from tests.contract import DTYPES, assert_near, assert_same_function, examples, leaf, randomise, rows

HEAD_DIM, SEQ_LEN = 8, 12


@pytest.mark.parametrize("position", examples(POSITION))
def test_what_is_added_to_tokens_equals_its_definition_with_gradients(position):
    layer = position.build(24, SEQ_LEN, TensorParallel())
    if layer is None:
        return
    randomise(layer)
    positions, _ = rows((5, 7), (12,))
    weights = list(layer.parameters())
    assert_same_function(lambda *_: layer(positions), lambda *_: layer.reference(positions), weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("position", examples(POSITION))
def test_turned_queries_equal_their_definition_with_gradients(position, dtype):
    positions, _ = rows((5, 7), (12,))
    tables = position.prepare(positions, HEAD_DIM)
    x = leaf(2, SEQ_LEN, 3, HEAD_DIM, dtype=dtype)

    def slow(x):
        return position.reference(x, positions) if tables is not None else x.double()

    assert_same_function(lambda x: position.rotate(x, tables), slow, [x])
    assert position.rotate(x, tables).dtype == dtype


@pytest.mark.parametrize("position", examples(POSITION))
def test_turned_queries_equal_their_definition_when_compiled(position):
    positions, _ = rows((5, 7), (12,))
    tables = position.prepare(positions, HEAD_DIM)
    fast = torch.compile(position.rotate, fullgraph=True, backend="aot_eager")

    def slow(x):
        return position.reference(x, positions) if tables is not None else x.double()

    assert_same_function(lambda x: fast(x, tables), slow, [leaf(2, SEQ_LEN, 3, HEAD_DIM)])


@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 10_000), st.sampled_from([100.0, 1e4, 5e5]))
@settings(deadline=None, max_examples=50)
def test_a_rotary_product_depends_on_the_distance_only(query, key, shift, theta):
    rotary = Rotary(theta=theta)
    q, k = leaf(1, 1, 1, 16, seed=1).double(), leaf(1, 1, 1, 16, seed=2).double()

    def product(at_q, at_k):
        turned_q = rotary.reference(q, torch.tensor([[at_q]]))
        return (turned_q * rotary.reference(k, torch.tensor([[at_k]]))).sum()

    torch.testing.assert_close(product(query, key), product(query + shift, key + shift), rtol=0, atol=1e-9)


def test_rotary_at_position_zero_turns_nothing():
    x = leaf(1, 1, 2, HEAD_DIM)
    rotary = Rotary()
    assert torch.equal(rotary.rotate(x, rotary.prepare(torch.zeros(1, 1, dtype=torch.int64), HEAD_DIM)), x)


def test_rotary_keeps_its_precision_at_a_million_tokens():
    rotary, positions = Rotary(theta=500_000.0), torch.tensor([[2**20 - 1, 2**20]])
    x = leaf(1, 2, 1, 64)
    assert_near(rotary.rotate(x, rotary.prepare(positions, 64)), rotary.reference(x, positions))


def test_rotary_refuses_an_odd_head():
    assert Rotary().unsupported_reasons(8) == []
    assert "head_dim=7 is odd" in Rotary().unsupported_reasons(7)[0]


def test_a_share_of_a_head_leaves_the_other_channels_as_they_are():
    rotary, x = Rotary(share=0.25), leaf(1, SEQ_LEN, 2, 16)
    positions, _ = rows((SEQ_LEN,))
    y = rotary.rotate(x, rotary.prepare(positions, 16))
    assert torch.equal(y[..., 4:], x[..., 4:])
    assert torch.equal(y[..., :4], Rotary().rotate(x[..., :4], Rotary().prepare(positions, 4)))
    assert "share=0.25 of head_dim=6 is 1 channels" in rotary.unsupported_reasons(6)[0]
    assert "above 0" in Rotary(share=0.0).problems()[0]


def test_rotary_refuses_a_base_of_one():
    assert "above 1" in Rotary(theta=1.0).problems()[0]
