"""Linear layers cut over tensor-parallel ranks (Shoeybi et al. 2019, arXiv:1909.08053, section 3).

A column-parallel layer holds some of the outputs, a row-parallel layer some of the inputs; one behind the other they
need one collective in each direction.
"""

from typing import Protocol

from torch import Tensor, nn

from megatrain.parallel.overlapped import column_linear, overlaps
from megatrain.parallel.product import linear
from megatrain.parallel.shard import Init, constant, parameter
from megatrain.parallel.tensor import TensorParallel


class Product(Protocol):
    """How a linear layer multiplies: in which number format, with which kernel.

    One that has a method `collect(x, weight, bias, tp)` also brings together the rows of a sequence that is cut over
    ranks, in a format of its own.
    """

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, /) -> Tensor:
        """[..., i], [o, i], [o] -> [..., o]."""
        ...


class ColumnParallelLinear(nn.Module):
    """y = x W^T (+ b), with the outputs cut over the ranks: [b, t, i] -> [b, t, o / size].

    Args:
        pieces: widths of outputs that are fused into this one product (q, k, v; gate, up); each is cut for itself.
        shared: for each piece, how many neighbouring ranks hold the same share of it; 1 by default.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        tp: TensorParallel,
        *,
        init: Init,
        pieces: tuple[int, ...] | None = None,
        shared: tuple[int, ...] | None = None,
        bias: bool = False,
        product: Product = linear,
    ):
        super().__init__()
        self.tp, self.product = tp, product
        self.weight = parameter(tp.cut((d_out, d_in), init, 0, pieces, shared))
        self.bias = parameter(tp.cut((d_out,), constant(0.0), 0, pieces, shared)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.product is linear and overlaps(x, self.tp):
            return column_linear(x, self.weight, self.bias, self.tp)
        if self.tp.cuts_sequence and hasattr(self.product, "collect"):
            return self.product.collect(x, self.weight, self.bias, self.tp)
        return self.product(self.tp.enter(x), self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """y = x W^T (+ b), with the inputs cut over the ranks: [b, t, i / size] -> [b, t, o], summed."""

    def __init__(
        self, d_in: int, d_out: int, tp: TensorParallel, *, init: Init, bias: bool = False, product: Product = linear
    ):
        super().__init__()
        self.tp, self.product = tp, product
        self.weight = parameter(tp.cut((d_out, d_in), init, 1))
        self.bias = parameter(tp.copied((d_out,), constant(0.0))) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.tp.size == 1:
            return self.product(x, self.weight, self.bias)
        y = self.tp.leave(self.product(x, self.weight, None))
        return y if self.bias is None else y + self.bias  # once, after the sum
