"""The kernel behind an RMSNorm's gradient on CPU tensors, in Triton's interpreter. A process of its own: the mode is
chosen once."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import itertools

import torch
import torch.nn.functional as F

from megatrain.nn.norm import rms_kernel
from megatrain.nn.norm.rms_norm import _Beside

EPS = 1e-5


def main() -> None:
    cases = itertools.product([(0, 8), (1, 8), (5, 48), (70, 33), (64, 130)], [torch.float32, torch.float16])
    for (n, d), dtype in cases:
        g = torch.Generator().manual_seed(n * d)
        x, grad_y, grad_beside = (torch.randn(2, n, d, generator=g).to(dtype) for _ in range(3))
        gain = torch.rand(d, generator=g).to(dtype)
        x.requires_grad_(), gain.requires_grad_()
        beside, y = _Beside.apply(x, gain, EPS)
        found = torch.autograd.grad((beside, y), (x, gain), (grad_beside, grad_y))

        exact_x, exact_gain = (t.detach().double().requires_grad_() for t in (x, gain))
        exact = F.rms_norm(exact_x, (d,), exact_gain, EPS)
        expected = torch.autograd.grad(
            (exact_x * 1, exact), (exact_x, exact_gain), (grad_beside.double(), grad_y.double())
        )
        tolerance = 1e-5 if dtype == torch.float32 else 4e-3
        assert torch.equal(beside, x)
        for mine, theirs in zip((y, *found), (exact, *expected), strict=True):
            assert mine.dtype == dtype
            torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance)
    strided = torch.randn(3, 16)[:, ::2], torch.rand(1, 3).T, torch.rand(16)[::2]
    x, rate, gain = strided
    grad = torch.randn(3, 8)
    for mine, theirs in zip(
        rms_kernel.backward(grad, x, rate, gain, grad),
        rms_kernel.backward(grad, x.contiguous(), rate.contiguous(), gain.contiguous(), grad),
        strict=True,
    ):
        assert torch.equal(mine, theirs)
    print("equal")


if __name__ == "__main__":
    main()
