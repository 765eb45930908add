"""Weight gradients that are paid later are those that backward would have given, and are paid once."""

import pytest
import torch
from torch import nn

from megatrain.nn.feed_forward.swiglu import SwiGLU
from megatrain.parallel.deferred import DeferredProduct, defer_weight_gradients
from megatrain.parallel.linear import ColumnParallelLinear
from megatrain.parallel.product import linear
from megatrain.parallel.shard import initialise, normal
from megatrain.parallel.tensor import TensorParallel

B, T, D = 2, 3, 8


def layer(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A feed-forward layer: a column-parallel and a row-parallel linear, both with biases."""
    model = SwiGLU(bias=True).build(D, 12, TensorParallel(), init_std=0.5, out_std=0.5)
    initialise(model, seed=1)
    return model.to(dtype)


def inputs(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.randn(B, T, D, generator=g).to(dtype).requires_grad_() for _ in range(3)]


def tap(products: list[DeferredProduct], dtype: torch.dtype = torch.float32) -> None:
    for product in products:
        product.tap(B, T, dtype, torch.device("cpu"))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own doing
@pytest.mark.parametrize("compiled", [False, True])
def test_paid_gradients_are_those_of_backward(compiled: bool) -> None:
    plain, split = layer(), layer()
    queue, products = defer_weight_gradients(split)
    forward = torch.compile(split.forward, fullgraph=True, backend="aot_eager") if compiled else split.forward
    pays = []
    for mine, theirs in zip(inputs(), inputs(), strict=True):
        tap(products)
        forward(mine).square().sum().backward()
        pays.append(queue.take())
        plain(theirs).square().sum().backward()
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert [p.grad for p in (split.gate_up.weight, split.down.weight)] == [None, None], "paid before its time"
    for pay in (pays[1], pays[0], pays[2]):
        pay()
    for (name, a), (_, b) in zip(split.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda m, name=name: f"{name}: {m}")
    before = split.down.weight.grad.clone()
    pays[0]()
    assert torch.equal(split.down.weight.grad, before), "paid twice"


def test_recomputed_layers_owe_once() -> None:
    plain, split = layer(), layer()
    queue, products = defer_weight_gradients(split)
    first, second, _ = inputs()
    outs = []
    for x in (first, second):  # two are under way at once, as in a pipeline
        tap(products)
        outs.append(torch.utils.checkpoint.checkpoint(split, x, use_reentrant=False))
    for out, x in zip(outs, (first, second), strict=True):
        out.square().sum().backward()
        queue.take()()
        plain(x.detach()).square().sum().backward()
    torch.testing.assert_close(split.gate_up.weight.grad, plain.gate_up.weight.grad)


def test_bf16_weights_get_float32_gradients() -> None:
    """A hundred equal small gradients on top of a large one are all counted."""
    column = ColumnParallelLinear(1, 1, TensorParallel(), init=normal(1.0)).to(torch.bfloat16)
    queue, products = defer_weight_gradients(column)
    for size in (1.0, *([2.0**-9] * 256)):
        products[0].tap(1, 1, torch.bfloat16, torch.device("cpu"))
        x = torch.full((1, 1, 1), size, dtype=torch.bfloat16, requires_grad=True)
        column(x).sum().backward()
        queue.take()()
    assert column.weight.grad.dtype == torch.float32
    assert column.weight.grad.item() == 1.5


def test_autocast_owes_in_bf16_and_sums_in_float32() -> None:
    plain, split = layer(), layer()
    queue, products = defer_weight_gradients(split)
    for mine, theirs in zip(inputs(), inputs(), strict=True):
        tap(products, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            mine_out, theirs_out = split(mine), plain(theirs)
        assert mine_out.dtype == torch.bfloat16
        mine_out.float().square().sum().backward()
        theirs_out.float().square().sum().backward()
        queue.take()()
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=2e-2, atol=2e-2)
    assert split.down.weight.grad.dtype == torch.float32
    torch.testing.assert_close(split.down.weight.grad, plain.down.weight.grad, rtol=2e-2, atol=5e-2)


def test_only_plain_products_are_deferred_and_only_where_tapped() -> None:
    split = layer()
    split.down.product = lambda x, weight, bias: linear(x, weight, bias)
    queue, products = defer_weight_gradients(split)
    assert [product.layer for product in products] == [split.gate_up]
    tap(products)
    products[0].untap()
    split(inputs()[0]).sum().backward()
    assert split.gate_up.weight.grad is not None
    queue.take()()
