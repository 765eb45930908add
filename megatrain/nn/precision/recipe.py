"""What a recipe for products in eight bits is: how operands are rounded, and how they are multiplied.

Each operand is a matrix [n, k] whose last dimension is summed over. A recipe says in which format it is rounded and
which elements share a scale; forward and both gradients are then the same three lines.

    y = x w^T          grad x = g w = g (w^T)^T          grad w = g^T x = g^T (x^T)^T
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatrain.parallel.mesh import Axis

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

    @property
    def one_scale(self) -> bool:
        """One scale serves a whole operand, so that it is that of its columns and of each part of it too."""
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


class OneScale(Recipe, Protocol):
    """A recipe whose `one_scale` is true."""

    def format(self, what: str) -> torch.dtype: ...

    def scale(self, amax: Tensor, what: str) -> Tensor:
        """float32 []: the scale of an operand whose largest number has this size."""
        ...

    def by_scale(self, x: Tensor, what: str, scale: Tensor) -> Rounded:
        """Round [n, k] by a scale that is known."""
        ...
