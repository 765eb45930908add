"""Products in bf16, native or by way of float32, against float64 on the rounded operands."""

import pytest
import torch
import torch.nn.functional as F

from megatrain.parallel import product
from megatrain.parallel.product import add_product, by_float32, linear
from tests.contract import assert_near, leaf

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


def test_float32_products_are_torchs_own(native):
    x, w = leaf(2, 5, 24), leaf(16, 24)
    assert not by_float32(x)
    assert torch.equal(linear(x, w), F.linear(x, w))


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
