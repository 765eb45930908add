"""Products in eight bits: operands are scaled, rounded, multiplied, and the scales taken out again.

Each operand is a matrix [n, k] whose last dimension is summed over. A recipe says in which format it is rounded and
which elements share a scale; forward and both gradients are then the same three lines.

    y = x w^T          grad x = g w = g (w^T)^T          grad w = g^T x = g^T (x^T)^T
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatrain.parallel.mesh import ALONE, Axis
from megatrain.parallel.product import add_product, linear, product_format

INPUT, WEIGHT, GRADIENT = "input", "weight", "gradient"
"""What an operand is; formats may differ."""


@dataclass(frozen=True)
class Rounded:
    """A matrix [n, k] in eight bits: its numbers are `values` x `scale`."""

    values: Tensor
    scale: Tensor
    """float32 [] or [n, 1]; or [n, k / 32], where 32 neighbours share one."""

    @property
    def scale_row(self) -> Tensor:
        """The scale as it meets the columns of a product: [] or [1, n]."""
        return self.scale.T if self.scale.ndim else self.scale


class Recipe(Protocol):
    """How operands are rounded and multiplied."""

    @property
    def weight_gradient(self) -> str:
        """`low`: in eight bits as the others; `high`: in the format of the run."""
        ...

    def round(self, x: Tensor, what: str, axis: Axis) -> Rounded:
        """Scale and round [n, k]. Tensor-parallel ranks of `axis` hold other parts of the same operand."""
        ...

    def multiply(self, a: Rounded, b: Rounded, out: torch.dtype) -> Tensor:
        """a b^T: [n, k], [m, k] -> [n, m]."""
        ...

    def lost(self, x: Tensor, rounded: Rounded) -> Tensor:
        """float32 [2]: how many elements stand at the end of the format, and how many became 0 that were not."""
        ...


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
            y = recipe.multiply(recipe.round(rows, INPUT, axis), recipe.round(weight.to(out), WEIGHT, axis), out)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        recipe, axis, out = ctx.recipe, ctx.axis, ctx.out
        grad_x = grad_weight = None
        with torch.autocast(x.device.type, enabled=False):
            g, rows = grads[0].to(out).flatten(0, -2), x.flatten(0, -2)
            if ctx.needs_input_grad[0]:
                by = recipe.round(weight.to(out).T, WEIGHT, axis)
                grad_x = recipe.multiply(recipe.round(g, GRADIENT, axis), by, out).unflatten(0, x.shape[:-1])
                grad_x = grad_x.to(ctx.format)
            if ctx.needs_input_grad[1] and recipe.weight_gradient == "high":
                grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
                add_product(grad_weight, g, rows)
            elif ctx.needs_input_grad[1]:
                by = recipe.round(rows.T, INPUT, axis)
                grad_weight = recipe.multiply(recipe.round(g.T, GRADIENT, axis), by, torch.float32)
        return grad_x, grad_weight, None, None


class Quantised:
    """A linear's `Product` in eight bits, which can be told to go back to bf16 and to measure what it loses.

    What is told stands in attributes that the engine sets between steps, so a compiled block is compiled once for each
    of them.
    """

    def __init__(self, recipe: Recipe, axis: Axis = ALONE):
        self.recipe, self.axis = recipe, axis
        self.demoted = False
        """Multiply in the format of the run instead."""
        self.measuring: Tensor | None = None
        """float32 [5], where set: sums of squared errors, of squared outputs, counts of operand elements at the end of
        the format, of those that became 0, and of all, to which every call adds."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.measuring is not None:
            self._measure(x, weight)
        if self.demoted:
            return linear(x, weight, bias)
        return quantised_linear(x, weight, bias, self.recipe, self.axis)

    @torch.no_grad()
    def _measure(self, x: Tensor, weight: Tensor) -> None:
        assert self.measuring is not None
        out = product_format(x)
        exact = linear(x, weight).float()
        off = quantised_linear(x, weight, None, self.recipe, self.axis).float() - exact
        operands = [(x.to(out).flatten(0, -2), INPUT), (weight.to(out), WEIGHT)]
        lost = torch.zeros(2, device=x.device)
        for operand, what in operands:
            lost += self.recipe.lost(operand, self.recipe.round(operand, what, self.axis))
        count = torch.full((), float(sum(operand.numel() for operand, _ in operands)), device=x.device)
        self.measuring += torch.stack([off.square().sum(), exact.square().sum(), *lost.unbind(), count])
