"""The norm of a gradient that is spread over ranks, and the two decisions taken from it: clip, and skip.

Everything stays on the device: no number is brought to the host.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.parallel.mesh import Axis
from megatrain.parallel.shard import Shard

CPU_PIECE = 65536
"""Elements whose float64 copies stay in a CPU's cache: seven times as fast as a tensor of 16 million at once."""


def counted_and_copies(shard: Shard, local: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The parts of `local` (of the shard's local shape) that this rank counts, and those that are counted elsewhere."""
    if all(part.counted for part in shard.parts):
        return [local], []
    pieces = local.split([part.stop - part.start for part in shard.parts], shard.dim)
    counted = [piece for part, piece in zip(shard.parts, pieces, strict=True) if part.counted]
    copies = [piece for part, piece in zip(shard.parts, pieces, strict=True) if not part.counted]
    return counted, copies


@dataclass
class Pieces:
    """This rank's pieces of a gradient, each with the name of its parameter."""

    names: list[str] = field(default_factory=list)
    counted: list[Tensor] = field(default_factory=list)
    copies: list[Tensor] = field(default_factory=list)
    """Pieces that are counted on another rank."""

    def add(self, name: str, piece: Tensor, counted: bool) -> None:
        if not counted:
            self.copies.append(piece)
        elif piece.numel():
            self.names.append(name)
            self.counted.append(piece)

    def squares(self, device: torch.device) -> tuple[Tensor, "ByParameter"]:
        """Sum of squares of all counted elements, and the same apart by parameter.

        The sum is a float64 scalar, so that no finite gradient has an infinite square. Copies add nothing; but where
        one is not finite, the sum is NaN, since this rank would step on it.
        """
        apart = _squares(self.counted, device)
        return apart.sum() + 0 * _squares(self.copies, device).sum(), ByParameter(self.names, apart)


@dataclass(frozen=True)
class ByParameter:
    """Squared norms of what this rank counts, still on the device: one for each name, which may come more than once."""

    names: list[str]
    squares: Tensor
    """float64 [n]"""

    def read(self) -> dict[str, float]:
        """Sums of squares by parameter. Waits for the device."""
        found: dict[str, float] = {}
        for name, square in zip(self.names, self.squares.tolist(), strict=True):
            found[name] = found.get(name, 0.0) + square
        return found


def squared_norm(counted: Iterable[Tensor], copies: Iterable[Tensor], device: torch.device) -> Tensor:
    """The first of `Pieces.squares`, of pieces without names."""
    found = [piece for piece in counted if piece.numel()]
    return Pieces([""] * len(found), found, list(copies)).squares(device)[0]


def _squares(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """float64 [n]: the sum of squares of each; of none, a tensor of none."""
    tensors = [t for t in tensors if t.numel()]
    if not tensors:
        return torch.zeros(0, dtype=torch.float64, device=device)
    if device.type != "cpu":
        return torch.stack(torch._foreach_norm(tensors, 2, torch.float32)).double().square()
    # On a CPU a norm is one long float32 sum, wrong by 1e-5 for a million elements and by how they are cut.
    pieces = [t.flatten().split(CPU_PIECE) for t in tensors]
    norms = torch.stack(torch._foreach_norm([p for of in pieces for p in of], 2, torch.float64))
    return torch.stack([part.sum() for part in norms.square().split([len(of) for of in pieces])])


def global_norm(squared: Tensor, axes: Iterable[Axis]) -> Tensor:
    """2-norm from each rank's `squared_norm`, summed over `axes`: a float32 scalar, the same on all their ranks.

    Args:
        axes: those along which ranks count different elements: tp and pp, and data where gradients are partitioned.
    """
    total = squared.clone()
    for axis in axes:
        if axis.size > 1:
            dist.all_reduce(total, group=axis.group)
    return total.sqrt().float()


def clip_divisor(norm: Tensor, limit: float | None) -> Tensor:
    """What gradients are divided by so that their norm is at most `limit`: max(1, norm / limit), a float32 scalar.

    Paper: Pascanu et al. 2012, arXiv:1211.5063, algorithm 1.
    """
    return (norm / (math.inf if limit is None else limit)).clamp(min=1.0)


def refused(norm: Tensor, loss: Tensor, most_loss: float) -> Tensor:
    """1 where a step is not to be taken, else 0: a float32 scalar, decided on the device.

    That is where the gradient behind `norm` has an infinity or a NaN in it (every element enters `squared_norm`, so one
    look at it is a look at them all), and where the loss is above `most_loss`.
    """
    return (~torch.isfinite(norm) | (loss > most_loss)).float()
