"""Products in eight bits: operands are scaled, rounded, multiplied, and the scales taken out again."""

from typing import Any

import torch
from torch import Tensor

from megatrain.nn.precision.gathered import gathered_linear
from megatrain.nn.precision.products import input_gradient, output, weight_gradient
from megatrain.nn.precision.recipe import INPUT, WEIGHT, Recipe
from megatrain.nn.precision.sharded import exact
from megatrain.parallel.collectives import all_reduce
from megatrain.parallel.mesh import ALONE, Axis
from megatrain.parallel.overlapped import column_linear, overlaps
from megatrain.parallel.product import linear, product_format
from megatrain.parallel.tensor import TensorParallel


def quantised_linear(x: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe, axis: Axis) -> Tensor:
    """x W^T + b: [..., i], [o, i], [o] -> [..., o] in the format that products are asked in."""
    y = _QuantisedLinear.apply(x, weight, recipe, axis)
    return y if bias is None else y + bias.to(y.dtype)


class _QuantisedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Recipe, axis: Axis) -> Tensor:
        out = product_format(x)
        ctx.recipe, ctx.axis, ctx.out, ctx.format = recipe, axis, out, x.dtype
        ctx.save_for_backward(x.to(out), weight)
        with torch.autocast(x.device.type, enabled=False):
            rows = x.to(out).flatten(0, -2)
            y = output(recipe.round(rows, INPUT, axis), weight, recipe, axis, out)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        recipe, axis, out = ctx.recipe, ctx.axis, ctx.out
        grad_x = grad_w = None
        with torch.autocast(x.device.type, enabled=False):
            g, rows = grads[0].to(out).flatten(0, -2), x.flatten(0, -2)
            if ctx.needs_input_grad[0]:
                grad_x = input_gradient(g, weight, recipe, axis, out).unflatten(0, x.shape[:-1]).to(ctx.format)
            if ctx.needs_input_grad[1]:
                grad_w = weight_gradient(g, rows, weight, recipe, axis)
        return grad_x, grad_w, None, None


class Quantised:
    """A linear's `Product` in eight bits, which can be told to go back to bf16 and to measure what it loses.

    What is told stands in attributes that the engine sets between steps, so a compiled block is compiled once for each
    of them.
    """

    def __init__(self, recipe: Recipe, axis: Axis = ALONE, summed_over: Axis = ALONE):
        self.recipe, self.axis = recipe, axis
        """How operands are rounded, and the ranks that hold other parts of the same ones."""
        self.summed_over = summed_over
        """Ranks whose outputs are added up, so that only their sum can be off."""
        self.rows_over = ALONE
        """Ranks that hold rows of the weight, where it is gathered in eight bits."""
        self.demoted = False
        """Multiply in the format of the run instead."""
        self.measuring: Tensor | None = None
        """float32 [5], where set: sums of squared errors, of squared outputs, counts of operand elements at the end of
        the format, of those that became 0, and of all, to which every call adds."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.measuring is not None:
            self._measure(x, weight)
        if self.demoted:
            return linear(x, exact(weight, self.rows_over), bias)
        return self.multiply(x, weight, bias)

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product in eight bits: [..., i], [o, i], [o] -> [..., o]."""
        return quantised_linear(x, weight, bias, self.recipe, self.axis)

    def multiply_collected(self, x: Tensor, weight: Tensor, tp: TensorParallel) -> Tensor:
        """That of rows which are cut over the ranks of `tp`: [b, t / size, i] -> [b, t, o]."""
        return gathered_linear(x, weight, self.recipe, tp, self.axis)

    def collect(self, x: Tensor, weight: Tensor, bias: Tensor | None, tp: TensorParallel) -> Tensor:
        """A column-parallel product of rows that are cut over the ranks: [b, t / size, i] -> [b, t, o]."""
        if self.measuring is not None:
            self._measure(tp.enter(x), weight)
        if self.demoted:
            weight = exact(weight, self.rows_over)
            return column_linear(x, weight, bias, tp) if overlaps(x, tp) else linear(tp.enter(x), weight, bias)
        y = self.multiply_collected(x, weight, tp)
        return y if bias is None else y + bias.to(y.dtype)

    @torch.no_grad()
    def _measure(self, x: Tensor, weight: Tensor) -> None:
        assert self.measuring is not None
        out = product_format(x)
        unrounded = exact(weight, self.rows_over)
        y = linear(x, unrounded).float()
        off = self.multiply(x, weight, None).float() - y
        if self.summed_over.size > 1:
            y, off = all_reduce(torch.stack([y, off]), self.summed_over.group).unbind()
        operands = [(x.to(out).flatten(0, -2), INPUT), (unrounded.to(out), WEIGHT)]
        lost = torch.zeros(2, device=x.device)
        for operand, what in operands:
            lost += self.recipe.lost(operand, self.recipe.round(operand, what, self.axis))
        count = torch.full((), float(sum(operand.numel() for operand, _ in operands)), device=x.device)
        self.measuring += torch.stack([off.square().sum(), y.square().sum(), *lost.unbind(), count])
