"""A column-parallel product whose collectives run while something else is multiplied.

Backward has three products' worth of work and two collectives that need not wait for all of it: under sequence
parallelism the input is collected again while its gradient is computed (it is kept only as this rank's rows, which is
what makes activations small: Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2), and the gradient is summed over
ranks while that of the weight is computed. A row-parallel product has nothing to hide behind: all it does in backward
needs the collected gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatrain.parallel import collectives
from megatrain.parallel.product import by_float32, product_format
from megatrain.parallel.tensor import TensorParallel


def overlaps(x: Tensor, tp: TensorParallel) -> bool:
    """`column_linear` is for this input; what this CPU multiplies by way of float32 is not."""
    return tp.size > 1 and not by_float32(x)


def column_linear(x: Tensor, weight: Tensor, bias: Tensor | None, tp: TensorParallel) -> Tensor:
    """`linear(tp.enter(x), weight, bias)`, to the last bit, with its gradients."""
    return _ColumnLinear.apply(x, weight, bias, tp, product_format(x))


class _ColumnLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tp: TensorParallel, dtype: torch.dtype
    ) -> Tensor:
        kept = x.to(dtype)
        ctx.save_for_backward(kept, weight)
        ctx.tp, ctx.formats = tp, (x.dtype, None if bias is None else bias.dtype)
        with torch.autocast(x.device.type, enabled=False):
            whole = collectives.wait(collectives.start_all_gather(kept, tp.axis)) if tp.cuts_sequence else kept
            return F.linear(whole, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (kept, weight), grad, tp = ctx.saved_tensors, grads[0], ctx.tp
        x_format, bias_format = ctx.formats
        coming = kept
        if tp.cuts_sequence:
            coming = collectives.start_all_gather(collectives.in_backward(kept, grad), tp.axis)
        grad_x = (grad @ weight.to(grad.dtype)).to(x_format)
        start_sum = collectives.start_reduce_scatter if tp.cuts_sequence else collectives.start_all_reduce
        leaving = start_sum(grad_x, tp.axis)
        whole = collectives.wait(coming) if tp.cuts_sequence else kept
        rows = grad.flatten(0, -2)
        grad_weight = (rows.T @ whole.flatten(0, -2)).to(weight.dtype)
        grad_bias = None if bias_format is None else rows.sum(0).to(bias_format)
        return collectives.wait(leaving), grad_weight, grad_bias, None, None
