"""The kernels behind the loss on a GPU: equal to torch's softmax, and small enough to run without spilling."""

import pytest
import torch

from megatrain.audit.kernels import SHARED_LIMIT, resources
from megatrain.parallel import softmax_kernel
from megatrain.parallel.cross_entropy import linear_cross_entropy, reference
from megatrain.parallel.mesh import ALONE
from tests import interpreted

KERNELS = {
    "statistics": softmax_kernel.statistics_kernel,
    "gradient": softmax_kernel.gradient_kernel,
    "both": softmax_kernel.both_kernel,
}
TYPES = {
    "targets": "*i64", "weights": "*fp32", "statistics": "*fp32",
    "stride": "i32", "n_rows": "i32", "n_columns": "i32", "first": "i32",
}  # fmt: skip


def test_interpreted_kernels_give_torchs_loss_and_gradient() -> None:
    """Over block borders, rows of weight 0, logits of 100 and columns that are cut over two ranks."""
    interpreted.assert_equal("tests.parallel.interpreted_softmax")


@pytest.mark.parametrize("architecture", SHARED_LIMIT)
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_fit_their_card_without_spilling(name: str, architecture: int) -> None:
    for logits in ("*bf16", "*fp32"):
        kernel = KERNELS[name]
        types = {k: t for k, t in (TYPES | {"logits": logits}).items() if k in kernel.arg_names}
        block = {"block": softmax_kernel.BLOCK}
        found = resources(kernel, types, block, architecture, num_warps=softmax_kernel.WARPS)
        assert found.spilled == 0
        assert found.fits
        assert found.registers <= 128, "fewer than two programs would share a multiprocessor"


def test_a_spilling_kernel_would_be_seen() -> None:
    types = TYPES | {"logits": "*bf16"}
    found = resources(softmax_kernel.both_kernel, types, {"block": 65536}, 90, num_warps=4)
    assert found.spilled > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_loss_and_gradients_are_those_of_all_logits_at_once(dtype: torch.dtype) -> None:
    g = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(300, 64, device="cuda", dtype=dtype, generator=g).requires_grad_()
    head = (torch.randn(5003, 64, device="cuda", dtype=dtype, generator=g) / 8).requires_grad_()
    targets = torch.randint(0, 5000, (300,), device="cuda", generator=g)
    weights = torch.rand(300, device="cuda", generator=g)
    loss = linear_cross_entropy(hidden, head, targets, weights, axis=ALONE, first=0, n_valid=5000)
    expected = reference(hidden, head, targets, weights, n_valid=5000)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    mine, theirs = (torch.autograd.grad(x, (hidden, head)) for x in (loss, expected))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
