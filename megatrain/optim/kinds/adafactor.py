"""Adafactor: Adam whose second moment of a matrix is kept as the means of its rows and columns."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatrain.optim.optimizer import OPTIMIZER, Optimizer
from megatrain.optim.steps import Work
from megatrain.optim.whole import Held, Tile, Whole

ROW, COLUMN, VECTOR = "row_mean_sq", "column_mean_sq", "mean_sq"


@OPTIMIZER.register("adafactor")
@dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Adafactor in float32: m + n numbers of state for a matrix of m n.

        R <- b R + (1 - b) mean over columns of g^2       C <- b C + (1 - b) mean over rows of g^2,     b = 1 - t^decay
        u = g / sqrt(R C / mean(R))                       w <- w - lr weight_decay w - a u / max(1, rms(u) / d)
        a = max(eps, rms(w)) min(lr, 1 / sqrt(t))

    Each rank sums the squares that it holds, and the sums are summed over ranks, so all know the means of the whole
    matrix. The learning rate is a share of a weight's own size; 0.01 is the paper's.

    Paper: Shazeer and Stern 2018, arXiv:1804.04235, algorithm 4. Differs as torch's does: the learning rate caps the
    relative step, and the smallest variance is a floor and no summand.
    """

    weight_decay: float = 0.0
    decay: float = -0.8
    """Exponent of the step in 1 - b; the paper's beta2 hat."""
    eps: float = 1e-3
    """Smallest size of a weight that a step is measured by."""
    largest_update: float = 1.0
    """d: root mean square that an update may have before it is scaled down."""

    def problems(self) -> list[str]:
        found = super().problems()
        if not self.decay < 0:
            found.append(f"decay={self.decay} must be below 0")
        if self.eps <= 0:
            found.append(f"eps={self.eps} must be above 0")
        if self.largest_update <= 0:
            found.append(f"largest_update={self.largest_update} must be above 0")
        return found

    @property
    def states(self) -> tuple[str, ...]:
        return ()

    @property
    def sees_whole(self) -> bool:
        return True

    def vectors(self, name: str, shape: tuple[int, ...]) -> dict[str, int]:
        if len(shape) < 2:
            return {VECTOR: math.prod(shape)}
        return {ROW: math.prod(shape[:-1]), COLUMN: math.prod(shape[:-2]) * shape[-1]}

    def update(self, work: Work) -> None:
        step, whole = work.step, work.whole
        assert whole is not None
        go = step.go
        count = work.states[0]["step"] + go
        taken = count.clamp(min=1)  # 0 where the first step of all may change nothing
        mixed = taken**self.decay * go  # 1 - b, and 0 where nothing may change
        gradients = [step.gradient(p) for p in work.tensors]
        parts = {name: _Part(whole, name, held, work.tensors[i], gradients[i]) for name, (held, i) in work.held.items()}
        sizes = self._add_squares(work, parts, mixed)
        updates = {name: part.divided(work.vectors) for name, part in parts.items()}
        lengths = _summed(work, {name: part.squares_of(updates[name]) for name, part in parts.items()})
        rate = torch.clamp(taken.rsqrt(), max=step.lr)
        for p in work.tensors:
            p.mul_(1 - step.lr * step.weight_decay * go)
        for name, part in parts.items():
            numel = math.prod(whole.shapes[name])
            alpha = (sizes[name] / numel).sqrt().clamp(min=self.eps) * rate
            shrink = ((lengths[name] / numel).sqrt() / self.largest_update).clamp(min=1.0)
            part.weights.sub_(updates[name] * (alpha / shrink * go))
        for state in work.states:
            state["step"] += go

    def _add_squares(self, work: Work, parts: "dict[str, _Part]", mixed: Tensor) -> dict[str, Tensor]:
        """Move the means of all matrices of the group towards those of this gradient; return sums of squared weights.

        One sum over ranks carries all of it.
        """
        keys = [key for key in work.vectors if key[1] in work.names]
        device = work.states[0]["step"].device
        sums = {key: torch.zeros_like(work.vectors[key]) for key in keys}
        squares = torch.zeros(len(work.names), device=device)
        for k, name in enumerate(work.names):
            if name in parts:
                parts[name].add_squares(sums)
                squares[k] = parts[name].squares_of(parts[name].weights)
        assert work.whole is not None
        total = work.whole.sum(torch.cat([squares, *sums.values()])).split([len(squares), *map(len, sums.values())])
        for (what, name), new in zip(keys, total[1:], strict=True):
            m, n = work.whole.shapes[name]
            width = {ROW: n, COLUMN: m * n // len(new), VECTOR: 1}[what]
            work.vectors[what, name].lerp_(new / width, mixed)
        return dict(zip(work.names, total[0], strict=True))


def _summed(work: Work, squares: dict[str, Tensor]) -> dict[str, Tensor]:
    """A scalar of each parameter of the group, summed over ranks."""
    assert work.whole is not None
    device = work.states[0]["step"].device
    zero = torch.zeros((), device=device)
    return dict(
        zip(work.names, work.whole.sum(torch.stack([squares.get(n, zero) for n in work.names])).unbind(), strict=True)
    )


class _Part:
    """What this rank holds of one parameter, tile by tile; a tile lies within one matrix of a stack."""

    def __init__(self, whole: Whole, name: str, held: Held, p: Tensor, gradient: Tensor):
        shape = held.shard.full_shape
        self.name, self.is_vector = name, len(shape) < 2
        self.n_rows, self.n_columns = shape[-2] if len(shape) > 1 else 1, shape[-1]
        self.weights, self.gradient = held.of(p), held.of(gradient)
        self.tiles = [
            (tile, whole.counts(name, whole_tile))
            for whole_tile in whole.mine(name)
            for tile in self._within(whole_tile)
        ]

    def _within(self, tile: Tile) -> Iterator[Tile]:
        """`tile` cut where one matrix of a stack ends."""
        row, offset, stop = tile.row, tile.offset, tile.row + tile.n_rows
        while row < stop:
            end = min(stop, (row // self.n_rows + 1) * self.n_rows)
            yield Tile(row, end - row, tile.column, tile.n_columns, offset)
            offset += (end - row) * tile.n_columns
            row = end

    def add_squares(self, sums: dict[tuple[str, str], Tensor]) -> None:
        """Add the squared gradient to the sums over rows and columns, where this rank's copy counts."""
        for tile, counted in self.tiles:
            if counted:
                square = tile.local(self.gradient).square()
                self._columns(sums, tile).add_(square.sum(0))
                if not self.is_vector:
                    sums[ROW, self.name][tile.row : tile.row + tile.n_rows].add_(square.sum(1))

    def divided(self, vectors: dict[tuple[str, str], Tensor]) -> Tensor:
        """The gradient divided by the root of its estimated mean square, flat."""
        found = torch.empty_like(self.gradient)
        least = torch.finfo(torch.float32).eps
        for tile, _ in self.tiles:
            columns = self._columns(vectors, tile)
            if self.is_vector:
                estimate = columns[None]
            else:
                rows = vectors[ROW, self.name]
                first = tile.row // self.n_rows * self.n_rows
                mean = rows[first : first + self.n_rows].mean().clamp(min=least)
                estimate = rows[tile.row : tile.row + tile.n_rows, None] * columns / mean
            tile.local(found).copy_(tile.local(self.gradient) * estimate.clamp(min=least**2).rsqrt())
        return found

    def squares_of(self, flat: Tensor) -> Tensor:
        """Sum of squares of what this rank counts."""
        counted = [tile.local(flat).square().sum() for tile, counts in self.tiles if counts]
        return torch.stack(counted).sum() if counted else flat.new_zeros(())

    def _columns(self, vectors: dict[tuple[str, str], Tensor], tile: Tile) -> Tensor:
        """The part of a vector over columns that belongs to `tile`."""
        first = tile.row // self.n_rows * self.n_columns + tile.column
        return vectors[VECTOR if self.is_vector else COLUMN, self.name][first : first + tile.n_columns]
