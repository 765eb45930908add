"""Which part of a full tensor a rank holds: the one description that norms, checkpoints and converters read.

Every parameter carries a `Shard` as `parameter.shard`. Its name is its path in the undivided model. A full tensor is
seen as a matrix whose rows are the dimensions before the cut one (`dim`) and whose columns are the rest; a local tensor
is then one or more blocks of columns, and a flat range of it a few rectangles (`Box`) of the full matrix.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.base.random import generator

Init = Callable[[tuple[int, ...], torch.Generator], Tensor]
"""Draws the full tensor of a parameter, float32, from its shape and a generator."""


@dataclass(frozen=True)
class Part:
    """A range [start, stop) of the cut dimension that this rank holds."""

    start: int
    stop: int
    counted: bool = True
    """This rank is the one that saves these values and counts them in a norm (others may hold copies)."""
    shared: int = 1
    """So many neighbouring tensor-parallel ranks hold these values, each with a partial sum of their gradient."""


@dataclass(frozen=True)
class Shard:
    """What a local parameter is of its full tensor."""

    full_shape: tuple[int, ...]
    init: Init
    dim: int = 0
    """The dimension that tensor parallelism cuts; 0 for what it copies."""
    parts: tuple[Part, ...] = ()
    """Ranges of `dim` held here, in local order."""
    summed_over_tp: bool = False
    """Its gradient is a partial sum on each tensor-parallel rank (a copy under sequence parallelism)."""

    @property
    def partial(self) -> bool:
        """The gradient of some of it must be summed over tensor-parallel ranks."""
        return self.summed_over_tp or any(part.shared > 1 for part in self.parts)

    @property
    def local_shape(self) -> tuple[int, ...]:
        held = sum(part.stop - part.start for part in self.parts)
        return (*self.full_shape[: self.dim], held, *self.full_shape[self.dim + 1 :])

    @property
    def whole(self) -> bool:
        """This rank holds all of it, in the full tensor's order."""
        in_order = all(a.stop == b.start for a, b in itertools.pairwise(self.parts))
        return in_order and self.local_shape == self.full_shape

    def cut(self, full: Tensor) -> Tensor:
        """This rank's part of the full tensor, a copy of its own."""
        if self.whole:
            return full.clone()
        return torch.cat([full.narrow(self.dim, p.start, p.stop - p.start) for p in self.parts], self.dim)

    def boxes(self, start: int = 0, numel: int | None = None) -> Iterator["LocalBox"]:
        """Rectangles of the full matrix that make up the flat range [start, start + numel) of the local tensor.

        They come in flat order, and each is contiguous in the local tensor.
        """
        inner = math.prod(self.full_shape[self.dim + 1 :])
        blocks, left = [], 0  # (first local column, first full column, width, part)
        for part in self.parts:
            width = (part.stop - part.start) * inner
            blocks.append((left, part.start * inner, width, part))
            left += width
        local_width, n_rows = left, math.prod(self.full_shape[: self.dim])
        stop = n_rows * local_width if numel is None else start + numel
        at = start
        while at < stop:
            row, column = divmod(at, local_width)
            local_left, full_left, width, part = next(b for b in blocks if b[0] <= column < b[0] + b[2])
            if len(blocks) == 1 and column == 0 and stop - at >= width:
                box = Box(row, (stop - at) // width, full_left, width)
            else:
                begin = column - local_left
                box = Box(row, 1, full_left + begin, min(width - begin, stop - at))
            yield LocalBox(box, at - start, part.counted, part.shared)
            at += box.numel


@dataclass(frozen=True)
class Box:
    """A rectangle of a full tensor's matrix."""

    row: int
    n_rows: int
    column: int
    n_columns: int

    @property
    def numel(self) -> int:
        return self.n_rows * self.n_columns


@dataclass(frozen=True)
class LocalBox:
    """A box, where it begins in the flat local range that was asked about, and what its `Part` says of it."""

    box: Box
    offset: int
    counted: bool
    shared: int


@dataclass(frozen=True)
class Slice:
    """A rectangle of a full named tensor, and the local memory that holds it: reading it saves, writing it loads.

    `state` says which tensor of the parameter it is: "weights" (the fp32 master where there is one), "exp_avg", ...
    `matrix` is the full tensor's shape as a matrix, `values` a view [box.n_rows, box.n_columns].
    """

    state: str
    name: str
    full_shape: tuple[int, ...]
    matrix: tuple[int, int]
    box: Box
    values: Tensor
    counted: bool


def slices_of(state: str, name: str, shard: Shard, flat: Tensor, start: int = 0) -> Iterator[Slice]:
    """The slices of `flat`, which is the flat range of the local tensor that begins at `start`."""
    rows = math.prod(shard.full_shape[: shard.dim])
    matrix = (rows, math.prod(shard.full_shape) // max(1, rows))
    for piece in shard.boxes(start, flat.numel()):
        values = flat.narrow(0, piece.offset, piece.box.numel).view(piece.box.n_rows, piece.box.n_columns)
        yield Slice(state, name, shard.full_shape, matrix, piece.box, values, piece.counted)


# ------------------------------------------------------------------------------------------------ parameters


def normal(std: float) -> Init:
    return lambda shape, g: torch.randn(shape, generator=g) * std


def constant(value: float) -> Init:
    return lambda shape, g: torch.full(shape, value)


def parameter(shard: Shard, **options: Any) -> nn.Parameter:
    """An uninitialised parameter that knows its shard; `initialise` draws it."""
    p = nn.Parameter(torch.empty(shard.local_shape, **options))
    p.shard = shard  # type: ignore[attr-defined]
    return p


def shard_of(p: Tensor) -> Shard:
    """The shard that `parameter` put there."""
    return p.shard  # type: ignore[attr-defined]


def shards(model: nn.Module) -> dict[str, Shard]:
    """The shard of every parameter by its full name. Engines that replace parameters ask before they do."""
    return {name: shard_of(p) for name, p in model.named_parameters()}


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Draw every parameter from (seed, full name) over its full shape, then keep this rank's part of it.

    So every layout starts from the same weights, to the last bit.
    """
    for name, p in model.named_parameters():
        shard = shard_of(p)
        p.copy_(shard.cut(shard.init(shard.full_shape, generator(seed, name))))
