"""The three products of a linear layer in eight bits, of operands that are whole on this rank."""

import torch
from torch import Tensor

from megatrain.nn.precision.recipe import GRADIENT, INPUT, Recipe, Rounded
from megatrain.nn.precision.sharded import rounded_columns, rounded_weight
from megatrain.parallel.mesh import Axis
from megatrain.parallel.product import float32_product


def output(rows: Rounded, weight: Tensor, recipe: Recipe, axis: Axis, out: torch.dtype) -> Tensor:
    """rows weight^T: [n, i], [o, i] -> [n, o], in the format `out`."""
    return recipe.multiply(rows, rounded_weight(weight, recipe, axis, out), out)


def input_gradient(g: Tensor, weight: Tensor, recipe: Recipe, axis: Axis, out: torch.dtype) -> Tensor:
    """g weight: [n, o], [o, i] -> [n, i], in the format `out`."""
    return recipe.multiply(recipe.round(g, GRADIENT, axis), rounded_columns(weight, recipe, axis, out), out)


def weight_gradient(g: Tensor, rows: Tensor, weight: Tensor, recipe: Recipe, axis: Axis) -> Tensor:
    """g^T rows: [n, o], [n, i] -> float32 [o, i], in the format that the recipe says."""
    if recipe.weight_gradient == "high":
        return float32_product(g, rows)
    return recipe.multiply(recipe.round(g.T, GRADIENT, axis), recipe.round(rows.T, INPUT, axis), torch.float32)
