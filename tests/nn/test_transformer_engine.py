"""Transformer Engine as the backend of `precision.fp8`: what it is asked, what comes back, and when it cannot be."""

import sys
import types

import pytest
import torch

from megatrain.base.optional import optional
from megatrain.engine.api import Precision
from megatrain.engine.dtypes import dtype_table
from megatrain.nn.precision.fp8 import Fp8
from megatrain.nn.precision.transformer_engine import TransformerEngine, shape_problems, why_not
from megatrain.parallel.mesh import ALONE
from tests.contract import leaf
from tests.nn import engine_stand_in

ENGINE = Fp8(backend="transformer_engine", weight_gradient="low")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("gradient", ["e4m3", "e5m2"])
def test_a_product_is_the_engines_with_our_weight(gradient, dtype):
    """Forward and both gradients are those of operands with one scale each; a bias is added to what comes."""
    fp8 = Fp8(backend="transformer_engine", weight_gradient="low", gradient=gradient)
    x, weight, bias = leaf(4, 8, 32, dtype=dtype), leaf(48, 32, dtype=dtype), leaf(48, dtype=dtype)
    g = torch.randn(4, 8, 48).to(dtype)
    with engine_stand_in.installed() as recipes:
        y = TransformerEngine(fp8)(x, weight, bias)
        grads = torch.autograd.grad(y, [x, weight, bias], g)
    assert [type(recipe).__name__ for recipe in recipes] == ["Float8CurrentScaling"]
    rounded, low = engine_stand_in.rounded, torch.float8_e4m3fn if gradient == "e4m3" else torch.float8_e5m2
    rows, w = rounded(x.detach().flatten(0, 1), torch.float8_e4m3fn), rounded(weight.detach(), torch.float8_e4m3fn)
    h = rounded(g.flatten(0, 1), low)
    assert torch.equal(y.flatten(0, 1), (rows @ w.T).to(dtype) + bias)
    assert torch.equal(grads[0].flatten(0, 1), (h @ w).to(dtype))
    assert torch.equal(grads[1], (h.T @ rows).to(dtype))
    assert grads[2].shape == bias.shape


def test_float32_weights_meet_bf16_inputs_under_autocast():
    x, weight = leaf(2, 8, 32), leaf(48, 32)
    with engine_stand_in.installed(), torch.autocast("cpu", torch.bfloat16):
        y = TransformerEngine(ENGINE)(x, weight, None)
        y.float().sum().backward()
    assert (y.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)


def test_a_demoted_layer_multiplies_without_it_and_a_measured_one_with_it():
    x, weight = leaf(2, 8, 32, dtype=torch.bfloat16), leaf(48, 32, dtype=torch.bfloat16)
    product = ENGINE.product(ALONE, ALONE)
    assert isinstance(product, TransformerEngine)
    with engine_stand_in.installed() as recipes:
        product.demoted = True
        assert torch.equal(product(x, weight, None), x @ weight.T)
        assert not recipes
        product.measuring = torch.zeros(5)
        product(x, weight, None)
        assert len(recipes) == 1
    error = float(product.measuring[0] / product.measuring[1]) ** 0.5
    assert 0.001 < error < 0.1
    assert product.measuring[4] == x.numel() + weight.numel()


def test_blocks_of_32_are_asked_of_it_by_its_name():
    with engine_stand_in.installed() as recipes:
        fp8 = Fp8(backend="transformer_engine", kind="mx", weight_gradient="low")
        TransformerEngine(fp8)(leaf(1, 32, 32), leaf(48, 32), None)
    assert [(type(r).__name__, r.fp8_format.name) for r in recipes] == [("MXFP8BlockScaling", "E4M3")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "rowwise", "weight_gradient": "low"}, "has no rowwise scales: set kind to tensorwise or mx"),
        ({}, "makes weight gradients in FP8: set weight_gradient=low"),
        ({"weight_gradient": "low", "min_size": -1}, "min_size=-1 must be at least 0"),
    ],
)
def test_what_it_cannot_do_is_refused(options, words):
    assert words in " ".join(Fp8(backend="transformer_engine", **options).problems())
    assert not ENGINE.problems()


def test_where_it_cannot_be_used_is_said_with_what_to_do(monkeypatch):
    assert "needs an NVIDIA GPU, and this is a CPU: set backend=torch" in ENGINE.card_problem(None)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    optional.cache_clear()
    assert "is not usable here (" in ENGINE.card_problem((9, 0))
    old = types.ModuleType("transformer_engine.pytorch")
    monkeypatch.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", old)
    optional.cache_clear()
    assert "is older than 2.9 here" in ENGINE.card_problem((9, 0))
    optional.cache_clear()
    with engine_stand_in.installed():
        assert why_not((9, 0)) == ENGINE.card_problem((9, 0)) == ""
        assert "needs a card with FP8 units" in ENGINE.card_problem((8, 0))
    (problem,) = shape_problems(40)
    assert "multiplies a multiple of 32 tokens at once" in problem
    assert not shape_problems(64)


def test_the_table_of_formats_names_it():
    table = dtype_table(Precision(compute="bf16", fp8=ENGINE), engine="fsdp2", zero=3, moments="fp32")
    assert ", by Transformer Engine, but the first 1 and last 1 blocks" in table["fp8 products"]
    assert table["parameters sent in"] == "fp32"  # weights travel unrounded: it rounds what has come


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_real_one_is_near_ours_on_a_gpu():
    if reason := why_not(torch.cuda.get_device_capability()):
        pytest.skip(reason)
    x, weight = (
        leaf(4, 32, 64, dtype=torch.bfloat16).detach().cuda(),
        leaf(48, 64, dtype=torch.bfloat16).detach().cuda(),
    )
    ours = Fp8(weight_gradient="low").product(ALONE, ALONE)(x, weight, None)
    torch.testing.assert_close(TransformerEngine(ENGINE)(x, weight, None), ours, rtol=0.02, atol=0.02)
