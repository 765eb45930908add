"""The kernel behind an RMSNorm's gradient on a GPU: the norm's own, and small enough to run without spilling."""

import pytest
import torch

from megatrain.audit.kernels import SHARED_LIMIT, resources
from megatrain.nn.norm import rms_kernel
from megatrain.nn.norm.rms_norm import WIDEST, RMSNorm
from megatrain.parallel.shard import initialise
from megatrain.parallel.tensor import TensorParallel
from tests import interpreted

TYPES = {"rate": "*fp32", "grad_gain": "*fp32", "n": "i32", "width": "i32"}


def test_the_interpreted_kernel_gives_the_norms_and_the_residuals_gradient() -> None:
    """Against float64: rows that fill no program, channels that fill no block, no rows at all."""
    interpreted.assert_equal("tests.nn.interpreted_norm")


@pytest.mark.parametrize("architecture", SHARED_LIMIT)
@pytest.mark.parametrize("block", [64, 1024, 4096, WIDEST])
def test_the_kernel_fits_its_card_without_spilling(block: int, architecture: int) -> None:
    for form in ("*bf16", "*fp32"):
        types = TYPES | dict.fromkeys(("grad", "x", "gain", "grad_beside", "grad_x"), form)
        constants = {"rows": rms_kernel.ROWS, "block": block}
        found = resources(rms_kernel.backward_kernel, types, constants, architecture, num_warps=rms_kernel.warps(block))
        assert found.spilled == 0
        assert found.fits


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 2048, 5120])
def test_on_a_gpu_compiled_gradients_are_the_eager_ones(width: int) -> None:
    norm = RMSNorm().build(width, TensorParallel())
    initialise(norm, seed=0)
    norm = norm.to("cuda", torch.bfloat16)
    x = torch.randn(2, 100, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    g, past = torch.randn_like(x), torch.randn_like(x)
    expected = torch.autograd.grad((norm(x), x * 1), (x, norm.weight), (g, past))
    beside, y = torch.compile(norm.beside, fullgraph=True)(x)
    for mine, theirs in zip(torch.autograd.grad((y, beside), (x, norm.weight), (g, past)), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=3e-2, atol=3e-2)
