"""Ranks arranged along axes, as a value: building a mesh is arithmetic and touches no network.

    mesh = Mesh.of(pp=2, dp=4, tp=8).at(rank=13)     # rank 13 of 64, on a laptop
    mesh = mesh.connect()                            # only this line opens process groups

Rank order, outer to inner: pp, dp, cp, tp, so that tensor-parallel ranks are neighbours in a node. Expert parallelism
(ep) cuts the dp x cp ranks of one pipeline stage and tensor-parallel rank.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from megatrain.base.errors import LayoutError

if TYPE_CHECKING:
    import torch.distributed as dist

ORDER = ("pp", "dp", "cp", "tp")

COMBINED = {
    "data": ("dp", "cp"),  # ranks that hold the same parameters: gradients are summed over them
    "row": ("cp", "tp"),  # ranks that hold parts of the activations of the same rows
    "stage": ("dp", "cp", "tp"),  # ranks that hold parts or copies of the same parameters
    "model": ("pp", "tp"),  # ranks that hold different parameters of one replica
    "world": ORDER,
}


@dataclass(frozen=True)
class Axis:
    """One rank's view of a mesh axis.

    `ranks` are the global ranks along it, `rank` is this process's place among them. `group` is the process group,
    None before `Mesh.connect` and in a process that stands alone.
    """

    name: str
    size: int = 1
    rank: int = 0
    ranks: tuple[int, ...] = (0,)
    group: "dist.ProcessGroup | None" = field(default=None, compare=False, repr=False)

    def part(self, n: int, what: str) -> tuple[int, int]:
        """This rank's contiguous share [start, stop) of `n` things.

        Raises:
            LayoutError: `n` does not divide.
        """
        if n % self.size:
            raise LayoutError(
                f"{what}={n} cannot be split over {self.name}={self.size}: pick {self.name} from {divisors(n)}"
            )
        each = n // self.size
        return self.rank * each, (self.rank + 1) * each


ALONE = Axis("alone")


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@dataclass(frozen=True)
class Mesh:
    """Sizes of all axes and this process's rank among them."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    rank: int = 0
    groups: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, *, pp: int = 1, dp: int = 1, cp: int = 1, tp: int = 1, ep: int = 1) -> "Mesh":
        """A mesh of these sizes, seen from rank 0.

        Raises:
            LayoutError: a size is below 1, or ep does not divide dp x cp.
        """
        for name, size in {"pp": pp, "dp": dp, "cp": cp, "tp": tp, "ep": ep}.items():
            if size < 1:
                raise LayoutError(f"{name}={size}: a mesh axis has at least 1 rank")
        if (dp * cp) % ep:
            raise LayoutError(f"ep={ep} does not divide dp x cp = {dp} x {cp}: pick ep from {divisors(dp * cp)}")
        return cls(pp=pp, dp=dp, cp=cp, tp=tp, ep=ep)

    @property
    def size(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    def at(self, rank: int) -> "Mesh":
        """The same mesh seen from `rank`."""
        if not 0 <= rank < self.size:
            raise LayoutError(f"rank {rank} is not in a mesh of {self.size} ranks")
        return dataclasses.replace(self, rank=rank)

    @cached_property
    def coordinates(self) -> dict[str, int]:
        """This rank's place along each axis."""
        found, rest = {}, self.rank
        for name in reversed(ORDER):
            rest, found[name] = divmod(rest, getattr(self, name))
        return found

    def axis(self, name: str) -> Axis:
        """The axis `name`: pp, dp, cp, tp, ep, or a combination: data (dp x cp), row (cp x tp), stage (dp x cp x
        tp), model (pp x tp), world."""
        ranks = next(row for row in self._rows(name) if self.rank in row)
        return Axis(name, len(ranks), ranks.index(self.rank), ranks, self.groups.get(name))

    def connect(self) -> "Mesh":
        """Open a process group for every axis. torch.distributed must be initialised with `size` ranks.

        Every rank opens every group, in the same order, as torch asks.
        """
        import torch.distributed as dist

        if dist.get_world_size() != self.size:
            raise LayoutError(f"the layout needs {self.size} ranks and {dist.get_world_size()} were started")
        groups = {}
        for name in (*ORDER, "ep", *COMBINED):
            for row in self._rows(name):
                group = dist.new_group(list(row), use_local_synchronization=False)
                if self.rank in row:
                    groups[name] = group
        return dataclasses.replace(self, groups=groups)

    def _rows(self, name: str) -> list[tuple[int, ...]]:
        """All groups of ranks along the axis `name`; each rank is in exactly one of them."""
        if name == "ep":
            return [
                row[i : i + self.ep] for row in self._rows("data") for i in range(0, len(row), self.ep)
            ]  # neighbours within dp x cp
        along = COMBINED.get(name, (name,))
        strides, stride = {}, 1
        for axis in reversed(ORDER):
            strides[axis] = stride
            stride *= getattr(self, axis)
        rows: dict[int, list[int]] = {}
        for rank in range(self.size):
            origin = rank - sum((rank // strides[a] % getattr(self, a)) * strides[a] for a in along)
            rows.setdefault(origin, []).append(rank)
        assert all(len(row) == math.prod(getattr(self, a) for a in along) for row in rows.values())
        return [tuple(row) for _, row in sorted(rows.items())]
