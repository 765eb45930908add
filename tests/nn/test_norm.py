"""Every registered norm against its definition in float64."""

import pytest
import torch

from megatrain.base.optional import nvidia_apex
from megatrain.nn.norm import NORM
from megatrain.nn.norm.rms_norm import RMSNorm
from megatrain.parallel.shard import initialise, shards
from megatrain.parallel.tensor import TensorParallel
from tests.contract import DTYPES, assert_near, assert_same_function, examples, leaf, randomise

WIDTH = 48


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", examples(NORM))
def test_a_norm_equals_its_definition_with_gradients(norm, dtype):
    layer = norm.build(WIDTH, TensorParallel())
    randomise(layer)
    x = leaf(2, 5, WIDTH, dtype=dtype)
    assert_same_function(lambda x, *_: layer(x), lambda x, *_: layer.reference(x), [x, *layer.parameters()])


@pytest.mark.parametrize("norm", examples(NORM))
def test_a_norm_equals_its_definition_with_gradients_when_compiled(norm):
    layer = norm.build(WIDTH, TensorParallel())
    randomise(layer)
    fast = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
    x = leaf(2, 5, WIDTH)
    assert_same_function(lambda x, *_: fast(x), lambda x, *_: layer.reference(x), [x, *layer.parameters()])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", examples(NORM))
def test_a_norm_on_a_gpu_equals_its_definition_by_apex_or_by_torch(norm, dtype):
    print(nvidia_apex("fused_layer_norm_cuda").why_not or "by apex")
    layer = norm.build(WIDTH, TensorParallel()).cuda()
    randomise(layer)
    x = leaf(2, 5, WIDTH, dtype=dtype).detach().cuda().requires_grad_()
    assert_same_function(lambda x, *_: layer(x), lambda x, *_: layer.reference(x), [x, *layer.parameters()])


@pytest.mark.parametrize("norm", examples(NORM))
def test_a_norm_takes_rows_that_are_no_rows_of_a_matrix(norm):
    """Heads cut out of one fused product, as query norms see them."""
    layer = norm.build(WIDTH, TensorParallel())
    randomise(layer)
    fused = leaf(2, 5, 3, WIDTH)
    assert_same_function(
        lambda x, *_: layer(x[:, :, 1:]), lambda x, *_: layer.reference(x[:, :, 1:]), [fused, *layer.parameters()]
    )


@pytest.mark.parametrize("norm", examples(NORM))
def test_a_norm_at_its_start_gives_rows_of_unit_scale(norm):
    layer = norm.build(WIDTH, TensorParallel())
    initialise(layer, seed=0)
    y = layer(leaf(4, 100, WIDTH) * 1000)
    assert_near(y.square().mean(-1), torch.ones(4, 100), 1e-4)


@pytest.mark.parametrize("norm", examples(NORM))
def test_a_row_of_zeros_stays_finite(norm):
    layer = norm.build(WIDTH, TensorParallel())
    initialise(layer, seed=0)
    x = torch.zeros(1, 1, WIDTH, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("norm", examples(NORM))
def test_every_parameter_of_a_norm_is_a_copy_on_each_rank(norm):
    for shard in shards(norm.build(WIDTH, TensorParallel())).values():
        assert shard.full_shape == shard.local_shape == (WIDTH,)


@pytest.mark.parametrize("kind", NORM.kinds())
def test_an_eps_of_zero_or_less_is_refused(kind):
    assert NORM[kind](eps=1e-6).problems() == []
    assert "above 0" in NORM[kind](eps=0.0).problems()[0]


def test_a_norm_over_a_cut_dimension_equals_its_definition_where_one_rank_holds_all():
    layer = RMSNorm().build_cut(WIDTH, TensorParallel())
    randomise(layer)
    x = leaf(2, 5, WIDTH)
    assert_same_function(lambda x, *_: layer(x), lambda x, *_: layer.reference(x), [x, *layer.parameters()])
