"""Products in bf16, native or by float32, and in float32, against float64 on the same operands."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from megatrain.parallel import product
from megatrain.parallel.product import add_product, by_float32, linear, multiply
from tests.contract import assert_near, assert_same_function, leaf

ROUNDING = 2**-8
"""Half the distance of bf16 numbers, as a share of the number."""


@pytest.fixture(params=[True, False], ids=["native", "by float32"])
def native(request, monkeypatch) -> bool:
    monkeypatch.setattr(product, "CPU_MULTIPLIES_BF16", request.param)
    return request.param


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_bf16_product_rounds_its_operands_and_its_result_once(native, autocast, bias, compiled):
    dtype = torch.float32 if autocast else torch.bfloat16
    x, w, b = (leaf(*shape, dtype=dtype, seed=s) for s, shape in enumerate([(2, 5, 24), (16, 24), (16,)]))
    given = [x, w, b] if bias else [x, w]
    exact = [t.detach().bfloat16().double().requires_grad_() for t in given]
    fast = torch.compile(linear, fullgraph=True, backend="aot_eager") if compiled else linear
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert by_float32(x) is not native
        y = fast(*given)
    y_exact = F.linear(*exact)
    assert y.dtype == torch.bfloat16
    assert_near(y, y_exact, ROUNDING)
    cotangent = leaf(2, 5, 16, dtype=torch.bfloat16, seed=9).detach()
    found = torch.autograd.grad(y, given, cotangent)
    expected = torch.autograd.grad(y_exact, exact, cotangent.double())
    for a, c in zip(found, expected, strict=True):
        assert a.dtype == dtype
        assert_near(a, c, 2 * ROUNDING)


@pytest.fixture
def fresh_compiler() -> None:
    """Forgets what other tests compiled: each of their settings is one more graph of `linear`."""
    torch.compiler.reset()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_float32_products_are_those_of_float64(fresh_compiler, bias, compiled):
    fast = torch.compile(linear, fullgraph=True, backend="aot_eager") if compiled else linear
    given = [leaf(2, 5, 24), leaf(16, 24, seed=1), leaf(16, seed=2)][: 3 if bias else 2]
    assert not by_float32(given[0])
    assert_same_function(fast, lambda *inputs: F.linear(*(t.double() for t in inputs)), given, 1e-6)


def test_a_product_takes_what_lies_the_other_way_round():
    a, b = leaf(2, 5, 24).detach(), leaf(16, 24, seed=1).detach()
    assert_near(multiply(a, b.T), a.double() @ b.T.double(), 1e-6)
    turned = leaf(24, 5, seed=2).detach().T
    assert_near(linear(turned, b), turned.double() @ b.T.double(), 1e-6)


@pytest.mark.parametrize(("n", "i", "o"), [(0, 24, 16), (5, 24, 0), (5, 0, 16)])
def test_a_product_of_nothing_is_as_torch_has_it(n, i, o):
    x, w = torch.zeros(n, i), torch.zeros(o, i)
    assert torch.equal(linear(x, w), F.linear(x, w))
    assert torch.equal(multiply(x, w.T), x @ w.T)


def test_flops_of_products_are_counted():
    x, w = leaf(2, 5, 24), leaf(16, 24, seed=1)
    with FlopCounterMode(display=False) as counter:
        linear(x, w).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (2 * 5) * 24 * 16


def test_a_sum_made_in_parts_is_the_whole(monkeypatch):
    monkeypatch.setattr(product, "ROWS", 3)
    total = leaf(16, 24).detach()
    grad, x = (leaf(40, n, dtype=torch.bfloat16, seed=n).detach() for n in (16, 24))
    exact = total.double() + grad.double().T @ x.double()
    add_product(total, grad, x)
    assert_near(total, exact, ROUNDING)


def test_what_needs_no_gradient_gets_none(native):
    x, w = leaf(2, 5, 24, dtype=torch.bfloat16).detach(), leaf(16, 24, dtype=torch.bfloat16)
    linear(x, w).sum().backward()
    assert w.grad.isfinite().all()
    assert x.grad is None
