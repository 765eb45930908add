"""Which linear layers of a model multiply in eight bits."""

import itertools
import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from megatrain.nn.precision.quantised import Quantised
from megatrain.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatrain.parallel.mesh import ALONE, Axis
from megatrain.parallel.shard import shard_of

MULTIPLE = 16
"""Both dimensions of what a rank holds of a weight are multiples of this: the units of GPUs take no others."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The layers that a recipe is used for, and how they are watched."""

    layers: str = "*"
    """A shell pattern over names such as layers.3.feed_forward.down."""
    min_size: int = 2**20
    """Elements of the whole weight below which a layer stays as it is: rounding would cost more than it saves."""
    keep_first: int = 1
    """Blocks at the beginning that stay as they are."""
    keep_last: int = 1
    """Blocks at the end that stay as they are. Embedding and head always do."""
    guard_every: int = 100
    """Steps from one look of the guard to the next; 0 switches it off."""
    guard_limit: float = 0.1
    """Relative error of a layer's output beyond which it is demoted; below half of it it is promoted back."""

    def problems(self) -> list[str]:
        found = [
            f"{name}={getattr(self, name)} must be at least 0"
            for name in ("min_size", "keep_first", "keep_last", "guard_every")
            if getattr(self, name) < 0
        ]
        if self.guard_limit <= 0:
            found.append(f"guard_limit={self.guard_limit} must be above 0")
        return found

    def product(self: Any, axis: Axis, summed_over: Axis) -> Quantised:
        """How one of the layers multiplies; the ranks are those of `Quantised`."""
        return Quantised(self, axis, summed_over)

    def selects(self, name: str, size: int, n_layers: int) -> bool:
        """Whether the layer `name` with a weight of `size` elements, in a model of `n_layers` blocks, is one."""
        block = block_of(name)
        inner = block is not None and self.keep_first <= block < n_layers - self.keep_last
        return inner and size >= self.min_size and fnmatchcase(name, self.layers)


def block_of(name: str) -> int | None:
    """The number of the block that a layer is in: 3 of layers.3.feed_forward.down."""
    parts = name.split(".")
    numbers = [int(part) for before, part in itertools.pairwise(parts) if before == "layers" and part.isdigit()]
    return numbers[0] if numbers else None


def linears(model: nn.Module) -> dict[str, Any]:
    """The linear layers of a model, or of a stage of one, by the full name of their weight without `.weight`."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = [module for module in model.modules() if isinstance(module, ColumnParallelLinear | RowParallelLinear)]
    return {names[id(module.weight)].removesuffix(".weight"): module for module in found}


def selected(model: nn.Module, selection: Selection, n_layers: int) -> dict[str, Any]:
    """The linear layers that `selection` is for."""
    return {
        name: layer
        for name, layer in linears(model).items()
        if selection.selects(name, math.prod(shard_of(layer.weight).full_shape), n_layers)
    }


def selection_problems(model: nn.Module, selection: Selection, n_layers: int, key: str) -> list[str]:
    """Why the selected layers of (a rank's part of) `model` cannot be multiplied in eight bits."""
    found = selected(model, selection, n_layers)
    if not found:
        names = ", ".join(list(linears(model))[:3])
        return [
            f"{key} is for none of the model's layers: with layers={selection.layers}, min_size={selection.min_size}, "
            f"keep_first={selection.keep_first} and keep_last={selection.keep_last} nothing is left of {n_layers} "
            f"blocks with layers like {names}"
        ]
    problems = []
    for name, layer in found.items():
        shape = shard_of(layer.weight).local_shape
        for what, n in zip(("outputs", "inputs"), shape, strict=True):
            if n % MULTIPLE:
                problems.append(
                    f"{key}: {name} has {n} {what} on a rank, which is no multiple of {MULTIPLE} and cannot be "
                    f"multiplied in eight bits: change the model's sizes or layout.tp to {n - n % MULTIPLE} or "
                    f"{n + -n % MULTIPLE} of them, or leave the layer out by {key}.layers"
                )
    return problems[:4]


def quantise(
    model: nn.Module, selection: Any, n_layers: int, tp: Axis = ALONE, row: Axis = ALONE
) -> dict[str, Quantised]:
    """Let the selected layers multiply by the recipe `selection`; its products by the layers' names.

    Args:
        tp: the tensor-parallel ranks, over which outputs of row-parallel layers are added up.
        row: these and the context-parallel ones, which agree on the scale of an operand that is spread over them.
    """
    products = {}
    for name, layer in selected(model, selection, n_layers).items():
        summed_over = tp if isinstance(layer, RowParallelLinear) else ALONE
        layer.product = products[name] = selection.product(row, summed_over)
    return products
