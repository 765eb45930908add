"""The softmax kernels on CPU tensors, in Triton's interpreter. A process of its own: the mode is chosen once."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import itertools

import torch
import torch.nn.functional as F

from megatrain.parallel import softmax_kernel
from megatrain.parallel.cross_entropy import _chunk, _chunk_on_gpu
from megatrain.parallel.mesh import ALONE

softmax_kernel.BLOCK = 64  # several blocks a row, and a last one that is not full


def expected(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each row and gradient, by torch in float64."""
    x = logits.double().requires_grad_()
    losses = F.cross_entropy(x, targets, reduction="none") * weights
    losses.sum().backward()
    return losses.detach(), x.grad


def case(n: int, v: int, dtype: torch.dtype, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(n * v)
    logits = (torch.randn(n, v, generator=g) * scale).to(dtype)
    weights = torch.rand(n, generator=g)
    weights[0] = 0.0
    return logits, torch.randint(0, v, (n,), generator=g), weights


def with_z_loss() -> None:
    """The head's path on a GPU gives the loss and the gradient of the one on a CPU."""
    g = torch.Generator().manual_seed(2)
    x, head, weights = torch.randn(5, 8, generator=g), torch.randn(70, 8, generator=g), torch.rand(5, generator=g)
    targets = torch.tensor([0, 3, 69, 40, 64])
    loss, gradient, scale = _chunk(x, head, targets, weights, ALONE, 0, True, 0.05)
    found, whole, _ = _chunk_on_gpu(x, head, targets, weights, ALONE, 0, True, 0.05)
    torch.testing.assert_close(found, loss)
    torch.testing.assert_close(whole, gradient * scale, rtol=1e-5, atol=1e-5)


def main() -> None:
    for (n, v), (dtype, tolerance), scale in itertools.product(
        [(1, 1), (3, 64), (5, 203)], [(torch.float32, 2e-6), (torch.float16, 1e-3)], [1.0, 30.0]
    ):
        logits, targets, weights = case(n, v, dtype, scale)
        losses, gradient = expected(logits, targets, weights)

        whole = logits.clone()
        top, total, hit = softmax_kernel.statistics_and_gradient_(whole, targets, weights)
        torch.testing.assert_close(((total.log() + top - hit) * weights).double(), losses, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(whole.double(), gradient, rtol=tolerance, atol=tolerance)

        cut = v // 3  # as two tensor-parallel ranks would: unequal columns, statistics merged, then the gradient
        parts = [logits[:, :cut].contiguous(), logits[:, cut:].contiguous()]
        firsts = [0, cut]
        found = [softmax_kernel.statistics(x, targets, first) for x, first in zip(parts, firsts, strict=True)]
        top = torch.maximum(found[0][0], found[1][0])
        total = sum(f[1] * (f[0] - top).exp() for f in found)
        merged = torch.stack([top, total, found[0][2] + found[1][2]])
        for x, first in zip(parts, firsts, strict=True):
            softmax_kernel.gradient_(x, targets, weights, merged, first)
        torch.testing.assert_close(torch.cat(parts, 1).double(), gradient, rtol=tolerance, atol=tolerance)
    with_z_loss()
    print("equal")


if __name__ == "__main__":
    main()
