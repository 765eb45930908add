"""A column-parallel product in eight bits under sequence parallelism, which sends its input as it is multiplied.

Each rank rounds its own rows before they are collected: half of the bytes of bf16 travel, and since scales belong to
rows (or are agreed over the ranks) the operand is, to the last bit, what rounding the collected rows would give. Kept
for backward are this rank's rows alone (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2), which are collected
again, unrounded, while the input's gradient is multiplied, as `megatrain.parallel.overlapped` does in bf16.
"""

from typing import Any

import torch
from torch import Tensor

from megatrain.nn.precision.products import input_gradient, output, weight_gradient
from megatrain.nn.precision.recipe import INPUT, Recipe, Rounded
from megatrain.parallel import collectives
from megatrain.parallel.mesh import Axis
from megatrain.parallel.product import product_format
from megatrain.parallel.tensor import TensorParallel


def gathered_linear(x: Tensor, weight: Tensor, recipe: Recipe, tp: TensorParallel, axis: Axis) -> Tensor:
    """x W^T with the rows of x collected over the ranks of `tp`: [b, t / size, i], [o, i] -> [b, t, o].

    Ranks of `axis` hold other parts of the same operands.
    """
    return _GatheredLinear.apply(x, weight, recipe, tp, axis)


class _GatheredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Recipe, tp: TensorParallel, axis: Axis) -> Tensor:
        out = product_format(x)
        ctx.recipe, ctx.tp, ctx.axis, ctx.formats = recipe, tp, axis, (out, x.dtype)
        kept = x.to(out)
        ctx.save_for_backward(kept, weight)
        with torch.autocast(x.device.type, enabled=False):
            mine = recipe.round(kept.flatten(0, -2), INPUT, axis)
            y = output(collected(mine, x.shape[0], tp), weight, recipe, axis, out)
        return y.unflatten(0, (x.shape[0], -1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (kept, weight), recipe, tp, axis = ctx.saved_tensors, ctx.recipe, ctx.tp, ctx.axis
        out, x_format = ctx.formats
        with torch.autocast(kept.device.type, enabled=False):
            coming = collectives.start_all_gather(collectives.in_backward(kept, grads[0]), tp.axis)
            g = grads[0].to(out).flatten(0, -2)
            grad_x = input_gradient(g, weight, recipe, axis, out)
            grad_x = grad_x.unflatten(0, grads[0].shape[:2]).to(x_format)
            leaving = collectives.start_reduce_scatter(grad_x, tp.axis)
            rows = collectives.wait(coming).flatten(0, -2)
            grad_weight = weight_gradient(g, rows, weight, recipe, axis)
        return collectives.wait(leaving), grad_weight, None, None, None


def collected(mine: Rounded, batch: int, tp: TensorParallel) -> Rounded:
    """The rounded rows of all ranks, [batch x t, i], from each one's [batch x t / size, i]."""

    def gather(x: Tensor) -> Tensor:
        whole = collectives.all_gather(x.unflatten(0, (batch, -1)), tp.axis.group)
        return whole.flatten(0, 1)

    values = gather(mine.values.view(torch.uint8)).view(mine.values.dtype)  # not every backend sends eight-bit floats
    return Rounded(values, gather(mine.scale) if mine.scale.ndim else mine.scale)
