"""Context parallelism by exchanging tokens for heads (Jacobs et al. 2023, arXiv:2309.14509).

Between two all-to-alls each rank attends over whole rows with some of its heads, so every attention kind works
unchanged and causal work is balanced. It needs enough heads.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatrain.nn.context import CONTEXT
from megatrain.nn.where import Where
from megatrain.parallel.collectives import to_heads, to_tokens
from megatrain.parallel.mesh import ALONE, Axis, divisors


@CONTEXT.register("ulysses")
@dataclass(frozen=True)
class Ulysses:
    axis: Axis = ALONE

    def columns(self, seq_len: int) -> tuple[tuple[int, int], ...]:
        """Tokens [start, stop) of each row that this rank computes."""
        return (self.axis.part(seq_len, "data.seq_len"),)

    def prepare(self, kind: Any, whole: Where) -> Tensor | None:
        """The mask of a pass over whole rows."""
        return kind.prepare(whole)

    def attend(self, kind: Any, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor:
        """q [b, h, t / size, k], k and v [b, g, t / size, k] -> [b, h, t / size, k]."""
        q, k, v = (to_heads(x, self.axis) for x in (q, k, v))
        return to_tokens(kind.attend(q, k, v, where), self.axis)

    @staticmethod
    def length_problems(seq_len: int, size: int) -> list[str]:
        """Why rows of `seq_len` tokens cannot be cut over `size` ranks."""
        if seq_len % size == 0:
            return []
        return [f"data.seq_len={seq_len} cannot be cut over cp={size}: pick cp from {divisors(seq_len)}"]

    @staticmethod
    def head_problems(kind: Any, n_heads: int, n_kv_heads: int, tp: int, size: int) -> list[str]:
        """Why attention of `kind` with so many heads, cut over `tp`, cannot be shared by `size` ranks."""
        found = []
        for name, n in {"n_heads": n_heads, "n_kv_heads": n_kv_heads}.items():
            local = max(1, n // tp)
            if local % size:
                found.append(
                    f"model.{name}={n} leaves {local} heads on a tensor-parallel rank, which cp={size} cannot share: "
                    f"pick cp from {divisors(local)}, change model.{name}, or set layout.cp_kind=ring"
                )
        return found
