"""Matrix products in bf16 wherever the run is, and at the speed of float32 where a CPU has no bf16 ones.

An x86 CPU without AVX-512 multiplies bf16 matrices through a loop that is up to a hundred times slower than its float32
product. There the operands are rounded to bf16 as ever, multiplied as float32 numbers, and the result is rounded: what
a bf16 product with float32 sums gives, and gradients that are rounded once less.
"""

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CPU_MULTIPLIES_BF16 = (
    platform.machine().lower() not in ("x86_64", "amd64") or "AVX512" in torch.backends.cpu.get_cpu_capability()
)
"""oneDNN has bf16 products for this CPU. A constant, since the compiler must know it while it traces."""

ROWS = 256
"""Of a sum that is made in parts."""


def product_format(x: Tensor) -> torch.dtype:
    """The number format that products of `x` are asked in: autocast's where it is on, else that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def by_float32(x: Tensor) -> bool:
    """Products of `x` are asked in bf16 and this device is better off making them in float32."""
    return x.device.type == "cpu" and product_format(x) == torch.bfloat16 and not CPU_MULTIPLIES_BF16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: [..., i], [o, i], [o] -> [..., o], in the format that is asked for."""
    if not by_float32(x):
        return F.linear(x, weight, bias)
    if not torch.compiler.is_compiling():
        return _RoundedLinear.apply(x, weight, bias)
    with torch.autocast("cpu", enabled=False):
        bias = None if bias is None else rounded(bias)
        return F.linear(rounded(x), rounded(weight), bias).bfloat16()


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a b in their own format, whatever autocast says: [..., k], [k, m] -> [..., m]."""
    if _slow(a):
        return (a.float() @ b.float()).to(a.dtype)
    return a @ b


def add_product(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """total += grad^T x: [o, i], [n, o], [n, i], summed in float32 whatever the operands' format."""
    if grad.dtype == total.dtype:
        total.addmm_(grad.T, x)
    elif grad.device.type == "cuda":
        torch.addmm(total, grad.T, x, out_dtype=torch.float32, out=total)  # the product adds as it writes
    elif _slow(grad):
        total.addmm_(grad.float().T, x.float())
    else:  # some rows at a time: torch writes what it adds in float32 first, and new memory costs more than the sum
        for rows, more in zip(total.split(ROWS), (grad.T @ x).split(ROWS), strict=True):
            rows += more


def float32_product(grad: Tensor, x: Tensor) -> Tensor:
    """grad^T x: [n, o], [n, i] -> float32 [o, i]."""
    if grad.dtype == torch.float32 or grad.device.type != "cuda":
        return grad.T.float() @ x.float()
    return torch.mm(grad.T, x, out_dtype=torch.float32)


def float32_gradient(weight: Tensor) -> Tensor:
    """`weight.grad`, the sum that gradients are added to: float32 whatever the weight is, zeros where it is new."""
    if weight.grad is None:
        if weight.dtype != torch.float32:
            weight.grad_dtype = torch.float32
        weight.grad = torch.zeros_like(weight, dtype=torch.float32)
    return weight.grad


def _slow(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not CPU_MULTIPLIES_BF16


def rounded(x: Tensor) -> Tensor:
    """The values of bf16 as float32 numbers."""
    return x.bfloat16().float()


class _RoundedLinear(torch.autograd.Function):
    """Keeps the input in bf16, as a bf16 product would."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x16 = x.bfloat16()
        ctx.save_for_backward(x16, weight)
        ctx.formats = x.dtype, None if bias is None else bias.dtype
        with torch.autocast("cpu", enabled=False):
            return F.linear(x16.float(), rounded(weight), None if bias is None else rounded(bias)).bfloat16()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x16, weight = ctx.saved_tensors
        x_format, bias_format = ctx.formats
        with torch.autocast("cpu", enabled=False):
            grad = grads[0].float()
            rows = grad.flatten(0, -2)
            grad_x = (grad @ rounded(weight)).to(x_format) if ctx.needs_input_grad[0] else None
            grad_weight = rows.T @ x16.flatten(0, -2).float() if ctx.needs_input_grad[1] else None
            grad_bias = None if bias_format is None else rows.sum(0).to(bias_format)
        return grad_x, grad_weight, grad_bias
