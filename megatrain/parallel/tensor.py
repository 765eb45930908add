"""How activations enter and leave layers that are cut over tensor-parallel ranks."""

from dataclasses import dataclass

from torch import Tensor

from megatrain.parallel import collectives
from megatrain.parallel.mesh import ALONE, Axis
from megatrain.parallel.shard import Init, Part, Shard


@dataclass(frozen=True)
class TensorParallel:
    """The tensor-parallel axis, and whether activations between layers are cut over the sequence.

    With `sequence` (Korthikanti et al. 2022, arXiv:2205.05198), what lies between two parallel layers (norms,
    residuals) holds seq / size rows; without, every rank holds all of them.
    """

    axis: Axis = ALONE
    sequence: bool = False

    @property
    def size(self) -> int:
        return self.axis.size

    @property
    def cuts_sequence(self) -> bool:
        return self.sequence and self.axis.size > 1

    def enter(self, x: Tensor) -> Tensor:
        """[b, t or t/size, d] -> [b, t, d], the input of a column-parallel product on every rank."""
        return collectives.gather(x, self.axis) if self.cuts_sequence else collectives.copy(x, self.axis)

    def leave(self, y: Tensor) -> Tensor:
        """Partial sums [b, t, d] -> their sum [b, t or t/size, d]."""
        return collectives.scatter(y, self.axis) if self.cuts_sequence else collectives.reduce(y, self.axis)

    # --------------------------------------------------------------------------------- what ranks hold of a parameter

    def copied(self, shape: tuple[int, ...], init: Init, *, partial: bool | None = None) -> Shard:
        """A parameter that every rank holds whole.

        `partial` says that its gradient is a partial sum on each rank, as it is for all that works on a cut sequence
        (the default) or on some of the heads.
        """
        summed = self.cuts_sequence if partial is None else partial and self.size > 1
        return Shard(shape, init, parts=(Part(0, shape[0], counted=self.axis.rank == 0),), summed_over_tp=summed)

    def cut(
        self,
        shape: tuple[int, ...],
        init: Init,
        dim: int,
        pieces: tuple[int, ...] | None = None,
        shared: tuple[int, ...] | None = None,
    ) -> Shard:
        """A parameter cut along `dim`, which is made of `pieces` (q, k, v for example), each cut for itself.

        Args:
            shared: for each piece, how many neighbouring ranks hold the same share of it; 1 by default.

        Raises:
            LayoutError: a piece does not divide over the ranks.
        """
        pieces = pieces or (shape[dim],)
        parts, begin = [], 0
        for width, n in zip(pieces, shared or (1,) * len(pieces), strict=True):
            sharers = Axis(self.axis.name, self.size // n, self.axis.rank // n)
            start, stop = sharers.part(width, f"dimension {dim} of a weight of shape {shape}: piece")
            parts.append(Part(begin + start, begin + stop, counted=self.axis.rank % n == 0, shared=n))
            begin += width
        return Shard(shape, init, dim, tuple(parts))

    def rows(self, n: int) -> tuple[int, int]:
        """This rank's rows [start, stop) of `n`, where they need not divide: counts differ by one at most."""
        return n * self.axis.rank // self.size, n * (self.axis.rank + 1) // self.size
