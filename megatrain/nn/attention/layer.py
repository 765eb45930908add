"""The attention layer around any kind: projections, head norms, positions, cache."""

import math
from typing import Any

from torch import Tensor, nn

from megatrain.nn.context.ring import Ring
from megatrain.nn.where import Where
from megatrain.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatrain.parallel.shard import normal
from megatrain.parallel.tensor import TensorParallel


class SelfAttention(nn.Module):
    """Grouped-query self-attention: [b, t, d] -> [b, t, d].

    Args:
        kind, position, norm: the registered choices. `norm` serves queries and keys where the kind asks for it.
        name: under which the key-value cache keeps this layer.
        init_std, out_std: standard deviations of the input and the output projections at the start.
        cp: how ranks that hold other tokens of the same rows attend together.
    """

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        kind: Any,
        position: Any,
        norm: Any,
        tp: TensorParallel,
        name: str,
        init_std: float,
        out_std: float,
        out_bias: bool = False,
        cp: Any = Ring(),  # noqa: B008 (a frozen value)
    ):
        super().__init__()
        self.kind, self.position, self.name, self.cp = kind, position, name, cp
        self.head_dim = head_dim
        sharers = max(1, tp.size // n_kv_heads)  # neighbours whose queries read the same keys and values
        self.n_local, self.n_kv_local = n_heads // tp.size, n_kv_heads * sharers // tp.size
        widths = (n_heads * head_dim, n_kv_heads * head_dim, n_kv_heads * head_dim)
        shared = (1, sharers, sharers)
        self.to_qkv = ColumnParallelLinear(
            d_model, sum(widths), tp, init=normal(init_std), pieces=widths, shared=shared, bias=kind.bias
        )
        self.to_out = RowParallelLinear(n_heads * head_dim, d_model, tp, init=normal(out_std), bias=out_bias)
        self.q_norm = self.k_norm = None
        self.norm_over_width = kind.qk_norm and getattr(kind, "qk_norm_over", "head") == "width"
        if self.norm_over_width:
            self.q_norm, self.k_norm = norm.build_cut(widths[0], tp), norm.build_cut(widths[1], tp)
        elif kind.qk_norm:  # a rank normalises its own heads, so its gradient is a part of the whole
            self.q_norm = norm.build(head_dim, tp, partial=True)
            self.k_norm = norm.build(head_dim, tp, partial=True)

    def forward(self, x: Tensor, where: Where) -> Tensor:
        q, k, v = self._heads(x, where)
        if where.cache is not None:
            k, v = where.cache.extend(self.name, k, v)
        y = self.cp.attend(self.kind, q, k, v, where)
        return self.to_out(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, where: Where) -> tuple[Tensor, Tensor, Tensor]:
        """[b, t, d] -> q [b, h, t, k] and k, v [b, g, t, k], positions applied."""
        h, g = self.n_local, self.n_kv_local
        qkv = self.to_qkv(x).unflatten(-1, (h + 2 * g, self.head_dim))
        if self.q_norm is None or self.k_norm is None:
            q, k, v = self.position.rotate(qkv, where.tables, h + g).split([h, g, g], 2)  # q and k in one go
        else:
            q, k, v = qkv.split([h, g, g], 2)
            q = self.position.rotate(self._normalised(q, self.q_norm), where.tables)
            k = self.position.rotate(self._normalised(k, self.k_norm), where.tables)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _normalised(self, heads: Tensor, norm: nn.Module) -> Tensor:
        """Heads [b, t, h, k] over k, or over all of h and k."""
        return norm(heads.flatten(2)).unflatten(-1, heads.shape[2:]) if self.norm_over_width else norm(heads)


def residual_std(init_std: float, n_layers: int) -> float:
    """Standard deviation of projections into the residual stream, so that its variance does not grow with depth.

    Two such projections a layer add up: std / sqrt(2 n_layers) (Radford et al. 2019, section 2.3).
    """
    return init_std / math.sqrt(2 * n_layers)
