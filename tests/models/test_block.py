"""Every placement of norms against its equation, on sublayers and norms that are simple functions."""

import pytest
import torch
from torch import nn

from megatrain.models.block import BLOCKS
from megatrain.nn.dropout import Dropout
from megatrain.nn.norm.rms_norm import RMSNorm
from megatrain.parallel.tensor import TensorParallel
from tests.contract import assert_same_function, leaf, randomise, where

WIDTH = 6

EQUATIONS = {
    "pre": lambda x, a, f, n, m: (y := x + a(n(x))) + f(m(y)),
    "post": lambda x, a, f, n, m: m((y := n(x + a(x))) + f(y)),
    "output": lambda x, a, f, n, m: (y := x + n(a(x))) + m(f(y)),
    "parallel": lambda x, a, f, n, m: x + a(n(x)) + f(m(x)),
}


class Attention(nn.Linear):
    def forward(self, x, where=None):
        return super().forward(x).cumsum(1)


@pytest.mark.parametrize("placement", BLOCKS)
def test_a_block_equals_its_equation_with_gradients(placement):
    attention, feed_forward = Attention(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    block = BLOCKS[placement](
        attention, feed_forward, lambda: RMSNorm().build(WIDTH, TensorParallel()), lambda name: Dropout(0.0, name)
    )
    randomise(block)
    exact = [nn.functional.linear, torch.cumsum]

    def slow(x, *_):
        def attend(y):
            return exact[1](exact[0](y, attention.weight.double(), attention.bias.double()), 1)

        def feed(y):
            return exact[0](y, feed_forward.weight.double(), feed_forward.bias.double())

        norms = (block.attention_norm.reference, block.feed_forward_norm.reference)
        return EQUATIONS[placement](x.double(), attend, feed, *norms)

    x = leaf(2, 4, WIDTH)
    assert_same_function(lambda x, *_: block(x, where((4,), (4,))), slow, [x, *block.parameters()])


def test_only_the_sums_of_2017_need_no_norm_before_the_head():
    assert [name for name, block in BLOCKS.items() if block.ends_normalised] == ["post"]
