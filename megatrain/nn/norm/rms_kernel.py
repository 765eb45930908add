"""The gradient of an RMSNorm and of the residual connection around it in one go, on a GPU: a Triton kernel.

The compiler makes the sum over channels and the sum over tokens in kernels of their own, each of which reads all that
the other read. Here a program takes some rows, keeps its share of the gain's gradient in registers, and everything
crosses the memory once: 8 bytes a number in bf16 where the compiler's kernels move 11.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32
"""That one program takes. A constant, so that the gain's gradient is summed alike on every card."""


@triton.jit
def backward_kernel(
    grad, x, rate, gain, grad_beside, grad_x, grad_gain, n, width, rows: tl.constexpr, block: tl.constexpr
):
    """Rows [n, width] of the gradient of x, and each program's share of that of the gain."""
    at = tl.program_id(0)
    columns = tl.arange(0, block)
    inside = columns < width
    gains = tl.load(gain + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((block,), tl.float32)
    for i in range(rows):
        row = at * rows + i
        here = inside & (row < n)
        place = row.to(tl.int64) * width + columns
        r = tl.load(rate + row, mask=row < n, other=0.0)
        normal = tl.load(x + place, mask=here, other=0.0).to(tl.float32) * r
        g = tl.load(grad + place, mask=here, other=0.0).to(tl.float32)
        total += g * normal
        g *= gains
        past = tl.load(grad_beside + place, mask=here, other=0.0).to(tl.float32)
        result = past + r * (g - normal * (tl.sum(g * normal, 0) / width))
        tl.store(grad_x + place, result.to(grad_x.dtype.element_ty), mask=here)
    tl.store(grad_gain + at * width + columns, total, mask=inside)


@torch.library.custom_op("megatrain::rms_norm_backward", mutates_args=())
def backward(grad: Tensor, x: Tensor, rate: Tensor, gain: Tensor, grad_beside: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of x [..., d], and shares [p, d] in float32 whose sum is that of the gain.

    Args:
        grad: [..., d], of x * rate * gain.
        x: [..., d].
        rate: float32 [..., 1], 1 / root mean square of the row.
        gain: [d].
        grad_beside: [..., d], of x where it goes on beside the norm.
    """
    grad, x, rate, gain, grad_beside = (t.contiguous() for t in (grad, x, rate, gain, grad_beside))
    d = x.shape[-1]
    n = x.numel() // d
    grad_x, grad_gain = torch.empty_like(x), _shares(x)
    if n:
        block = triton.next_power_of_2(d)
        backward_kernel[(len(grad_gain),)](
            grad, x, rate, gain, grad_beside, grad_x, grad_gain, n, d,
            rows=ROWS, block=block, num_warps=warps(block),
        )  # fmt: skip
    return grad_x, grad_gain


@backward.register_fake
def _(grad: Tensor, x: Tensor, rate: Tensor, gain: Tensor, grad_beside: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), _shares(x)


def _shares(x: Tensor) -> Tensor:
    d = x.shape[-1]
    return x.new_empty((-(-x.numel() // d // ROWS), d), dtype=torch.float32)


def warps(block: int) -> int:
    """So many that a thread holds 8 channels: in bf16 what it can load at once."""
    return max(1, min(32, block // 256))
