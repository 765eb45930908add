"""Every registered feed-forward layer against its definition, alone and cut over two ranks."""

import pytest
import torch
import torch.distributed as dist

from megatrain.nn.feed_forward import FEED_FORWARD
from megatrain.parallel.collectives import own_rows
from megatrain.parallel.mesh import Mesh
from megatrain.parallel.shard import shard_of
from megatrain.parallel.tensor import TensorParallel
from tests.contract import DTYPES, assert_near, assert_same_function, examples, leaf, randomise
from tests.ranks import run

D_MODEL, D_FF = 16, 40


def layer_of(choice, tp: TensorParallel | None = None):
    return choice.build(D_MODEL, D_FF, tp or TensorParallel(), init_std=0.1, out_std=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("choice", examples(FEED_FORWARD))
def test_a_feed_forward_equals_its_definition_with_gradients(choice, dtype):
    layer = layer_of(choice).to(dtype)
    randomise(layer)
    x = leaf(2, 5, D_MODEL, dtype=dtype)
    assert_same_function(lambda x, *_: layer(x), lambda x, *_: layer.reference(x), [x, *layer.parameters()])


@pytest.mark.parametrize("choice", examples(FEED_FORWARD))
def test_a_feed_forward_equals_its_definition_with_gradients_when_compiled(choice):
    layer = layer_of(choice)
    randomise(layer)
    fast = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
    x = leaf(2, 5, D_MODEL)
    assert_same_function(lambda x, *_: fast(x), lambda x, *_: layer.reference(x), [x, *layer.parameters()])


@pytest.mark.parametrize("choice", examples(FEED_FORWARD))
def test_weights_in_products_are_counted(choice):
    matrices = [p for p in layer_of(choice).parameters() if p.ndim == 2]
    assert sum(p.numel() for p in matrices) == choice.n_weights(D_MODEL, D_FF)


def cut_against_whole() -> None:
    axis = Mesh.of(tp=2).at(dist.get_rank()).connect().axis("tp")
    for choice in (param.values[0] for param in examples(FEED_FORWARD)):
        for sequence in (False, True):
            tp = TensorParallel(axis, sequence)
            whole, local = layer_of(choice), layer_of(choice, tp)
            randomise(whole)
            with torch.no_grad():
                for p, full in zip(local.parameters(), whole.parameters(), strict=True):
                    p.copy_(shard_of(p).cut(full))
            x = leaf(2, 6, D_MODEL)
            cotangent = leaf(2, 6, D_MODEL, seed=5).detach()
            exact = whole(x)
            grads = torch.autograd.grad(exact, [x, *whole.parameters()], cotangent)
            own = own_rows if tp.cuts_sequence else lambda t, _: t
            x_here = own(x, axis).detach().requires_grad_()
            y = local(x_here)
            assert_near(y, own(exact, axis))
            found = torch.autograd.grad(y, [x_here, *local.parameters()], own(cotangent, axis))
            assert_near(found[0], own(grads[0], axis))
            for p, grad, expected in zip(local.parameters(), found[1:], grads[1:], strict=True):
                if shard_of(p).summed_over_tp:
                    dist.all_reduce(grad, group=axis.group)
                assert_near(grad, shard_of(p).cut(expected))


def test_tp_2_gives_the_outputs_and_gradients_of_tp_1():
    run(cut_against_whole, 2)
