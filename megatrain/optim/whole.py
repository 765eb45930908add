"""Whole matrices out of the parts that ranks hold, for optimisers that look at more than one element at a time.

A rank may hold a copy, some rows or columns (tensor parallelism), whole rows of those (fully_shard), or a flat range
that begins and ends anywhere (ZeRO). All of it is a few rectangles (`Tile`) of the full matrix, so one exchange serves
every engine: each matrix has an owner, to which the others send what they hold of it, and which sends each its part of
the result. Owners are spread over the ranks, so the work on matrices is shared among all of them.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.parallel.mesh import Axis
from megatrain.parallel.shard import Part, Shard

ROUND_ELEMENTS = 2**26
"""Elements of whole matrices that are exchanged at a time: 256 MiB, which bounds what a step needs beside its state."""


@dataclass(frozen=True)
class Held:
    """A flat range of a parameter's local tensor, and where it stands in one of an optimiser's tensors."""

    name: str
    """Full name of the parameter."""
    tensor: Tensor
    """What the optimiser steps on: the parameter, its master, its local rows, or a partition of many parameters."""
    shard: Shard
    start: int
    """Where the range begins in the flat local tensor that `shard` describes."""
    numel: int
    at: int = 0
    """Where the range begins in the flat `tensor`."""
    counted: bool = True
    """False where another data-parallel rank holds the same and saves it."""

    def of(self, x: Tensor) -> Tensor:
        """The range of `x`, which is laid out as `tensor` is: a flat view."""
        return x.view(-1).narrow(0, self.at, self.numel)


@dataclass(frozen=True)
class Tile:
    """A rectangle of a full matrix, and where it begins in the flat range that a rank holds."""

    row: int
    n_rows: int
    column: int
    n_columns: int
    offset: int

    @property
    def numel(self) -> int:
        return self.n_rows * self.n_columns

    @property
    def place(self) -> tuple[int, int, int, int]:
        return self.row, self.n_rows, self.column, self.n_columns

    def of(self, matrix: Tensor) -> Tensor:
        return matrix[self.row : self.row + self.n_rows, self.column : self.column + self.n_columns]

    def local(self, flat: Tensor) -> Tensor:
        return flat.narrow(0, self.offset, self.numel).view(self.n_rows, self.n_columns)


def matrix_shape(full_shape: Sequence[int]) -> tuple[int, int]:
    """A tensor as a matrix of its last dimension; a vector is one row."""
    return math.prod(full_shape[:-1]), full_shape[-1]


def tiles(shard: Shard, start: int, numel: int) -> list[Tile]:
    """The rectangles of the full matrix (`matrix_shape`) that the flat range [start, start + numel) consists of."""
    n = matrix_shape(shard.full_shape)[1]
    width = math.prod(shard.full_shape[shard.dim :])  # of the matrix in which `Shard.boxes` counts
    found: list[Tile] = []
    for piece in shard.boxes(start, numel):
        box = piece.box
        if width == n:
            found.append(Tile(box.row, box.n_rows, box.column, box.n_columns, piece.offset))
            continue
        for i in range(box.n_rows):
            found += _runs((box.row + i) * width + box.column, box.n_columns, n, piece.offset + i * box.n_columns)
    return found


def _runs(at: int, numel: int, n: int, offset: int) -> Iterator[Tile]:
    """Elements [at, at + numel) of a matrix of `n` columns: the end of a row, whole rows, the beginning of a row."""
    stop = at + numel
    while at < stop:
        row, column = divmod(at, n)
        whole = (stop - at) // n if column == 0 else 0
        tile = Tile(row, whole, 0, n, offset) if whole else Tile(row, 1, column, min(n - column, stop - at), offset)
        yield tile
        at, offset = at + tile.numel, offset + tile.numel


class Whole:
    """What every rank of `axis` holds of every matrix, known to all of them. All ranks make it together.

    Args:
        held: what this rank holds; a parameter of which it holds nothing is not among them.
        shards: of all parameters, by name.
        axis: ranks that hold parts or copies of the same parameters.
    """

    def __init__(self, held: Sequence[Held], shards: Mapping[str, Shard], axis: Axis):
        self.axis = axis
        self.shapes = {name: matrix_shape(shard.full_shape) for name, shard in shards.items()}
        self.held = {h.name: h for h in held}
        mine = {h.name: tiles(h.shard, h.start, h.numel) for h in held}
        self.tiles = _everyones(mine, axis)
        self.blocks = {name: blocks(shard) for name, shard in _everyones_parts(shards, axis).items()}
        self.owner = deal(self.shapes, axis.size)
        self._holders: dict[tuple[str, tuple[int, int, int, int]], list[int]] = defaultdict(list)
        for rank, of_rank in enumerate(self.tiles):
            for name, found in of_rank.items():
                for tile in found:
                    self._holders[name, tile.place].append(rank)

    def counts(self, name: str, tile: Tile) -> bool:
        """This rank is the first that holds `tile`: of all copies, its is the one that enters a sum."""
        return self._holders[name, tile.place][0] == self.axis.rank

    def mine(self, name: str) -> list[Tile]:
        return self.tiles[self.axis.rank].get(name, [])

    def rounds(self, names: Sequence[str]) -> Iterator[list[str]]:
        """`names` in lots of a bounded number of elements."""
        lot: list[str] = []
        filled = 0
        for name in names:
            numel = math.prod(self.shapes[name])
            if lot and filled + numel > ROUND_ELEMENTS:
                yield lot
                lot, filled = [], 0
            lot.append(name)
            filled += numel
        if lot:
            yield lot

    def to_owners(self, values: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Whole matrices [m, n] of those `names` that this rank owns, from the flat ranges that each rank holds."""
        me, ranks = self.axis.rank, range(self.axis.size)
        device = next(iter(values.values())).device if values else torch.device("cpu")
        sends = [
            [t.local(values[n]).reshape(-1) for n in names if self.owner[n] == r for t in self._sent(n, me, r)]
            for r in ranks
        ]
        owned = [name for name in names if self.owner[name] == me]
        comes = [[(name, tile) for name in owned for tile in self._sent(name, r, me)] for r in ranks]
        received = self._exchange(sends, [sum(t.numel for _, t in part) for part in comes], device)
        whole = {name: torch.empty(self.shapes[name], device=device) for name in owned}
        for part, flat in zip(comes, received, strict=True):
            at = 0
            for name, tile in part:
                tile.of(whole[name]).copy_(flat.narrow(0, at, tile.numel).view(tile.n_rows, tile.n_columns))
                at += tile.numel
        return whole

    def from_owners(self, whole: Mapping[str, Tensor], names: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """The flat range that this rank holds of each of `names`, from the matrices that the owners have."""
        me, ranks = self.axis.rank, range(self.axis.size)
        owned = [name for name in names if self.owner[name] == me]
        sends = [
            [tile.of(whole[name]).reshape(-1) for name in owned for tile in self.tiles[r].get(name, [])] for r in ranks
        ]
        comes = [[(n, t) for n in names if self.owner[n] == r for t in self.mine(n)] for r in ranks]
        received = self._exchange(sends, [sum(t.numel for _, t in part) for part in comes], device)
        flats = {name: torch.empty(self.held[name].numel, device=device) for name in names if name in self.held}
        for part, flat in zip(comes, received, strict=True):
            at = 0
            for name, tile in part:
                flats[name].narrow(0, tile.offset, tile.numel).copy_(flat.narrow(0, at, tile.numel))
                at += tile.numel
        return flats

    def sum(self, x: Tensor) -> Tensor:
        """`x` summed over all ranks, in place."""
        if self.axis.size > 1:
            dist.all_reduce(x, group=self.axis.group)
        return x

    def _sent(self, name: str, rank: int, owner: int) -> list[Tile]:
        """What `rank` sends to the owner: of copies the owner's own, or else that of the rank nearest to it."""

        def source(tile: Tile) -> int:
            return min(self._holders[name, tile.place], key=lambda holder: (abs(holder - owner), holder))

        return [tile for tile in self.tiles[rank].get(name, []) if source(tile) == rank]

    def _exchange(self, sends: list[list[Tensor]], sizes: list[int], device: torch.device) -> list[Tensor]:
        """What each rank sends to this one, flat, given what this one sends to each."""
        flats = [torch.cat(parts) if parts else torch.empty(0, device=device) for parts in sends]
        if self.axis.size == 1:
            return flats
        received = torch.empty(sum(sizes), device=device)
        dist.all_to_all_single(received, torch.cat(flats), sizes, [f.numel() for f in flats], group=self.axis.group)
        return list(received.split(sizes))


def deal(shapes: Mapping[str, tuple[int, int]], n_ranks: int) -> dict[str, int]:
    """An owner for each matrix, so that all have about the same number of multiplications (m n min(m, n)) to do."""
    costs = {name: m * n * min(m, n) for name, (m, n) in shapes.items()}
    loads = [0] * n_ranks
    owner = {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        owner[name] = loads.index(min(loads))
        loads[owner[name]] += costs[name]
    return owner


def blocks(shard: Shard) -> list[tuple[int, int]]:
    """Row ranges of the full matrix that are matrices of their own.

    Queries, keys and values, or gate and up, are fused into one parameter only to be multiplied in one go; and of a
    stack of matrices (experts) each is one.
    """
    m, _ = matrix_shape(shard.full_shape)
    rows = shard.full_shape[-2] if len(shard.full_shape) > 1 else 1
    pieces = [(0, rows)]
    if shard.dim == len(shard.full_shape) - 2:
        pieces = [(part.start, part.stop) for part in shard.parts]
    return [(first + a, first + b) for first in range(0, m, rows) for a, b in pieces if b > a]


def _everyones(mine: dict[str, list[Tile]], axis: Axis) -> list[dict[str, list[Tile]]]:
    if axis.size == 1:
        return [mine]
    found: list[dict[str, list[Tile]]] = [{}] * axis.size
    dist.all_gather_object(found, mine, group=axis.group)
    return found


def _everyones_parts(shards: Mapping[str, Shard], axis: Axis) -> dict[str, Shard]:
    """Shards of the undivided parameters: each part as wide as those of all ranks together."""
    ranges = {name: [(p.start, p.stop) for p in shard.parts] for name, shard in shards.items()}
    everyones = [ranges]
    if axis.size > 1:
        everyones = [{}] * axis.size
        dist.all_gather_object(everyones, ranges, group=axis.group)
    found = {}
    for name, shard in shards.items():
        of_ranks = [of_rank[name] for of_rank in everyones]
        parts = tuple(Part(min(p[0] for p in piece), max(p[1] for p in piece)) for piece in zip(*of_ranks, strict=True))
        found[name] = dataclasses.replace(shard, parts=parts)
    return found
