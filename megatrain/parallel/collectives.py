"""Collectives as conjugate pairs: what runs forward and what runs backward (Shoeybi et al. 2019, arXiv:1909.08053,
section 3; Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2).

Bodies are functional collectives, which torch.compile traces; each is waited for at once, since an eager layer must not
hand an unfinished tensor to a compiled one. On an axis of size 1 nothing is called at all.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor

from megatrain.parallel.mesh import Axis

# torch 2.13 renamed these two; the old names warn there and are the only ones in 2.11.
_gather_tensor: Callable = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
_scatter_tensor: Callable = getattr(funcol, "reduce_scatter_single", None) or funcol.reduce_scatter_tensor

SEQUENCE = 1
"""Activations are [b, t, d]; sequence parallelism cuts t."""


def all_reduce(x: Tensor, group: Any, operation: str = "sum") -> Tensor:
    return funcol.wait_tensor(funcol.all_reduce(x.contiguous(), operation, group))


def all_gather(x: Tensor, group: Any, dim: int = SEQUENCE) -> Tensor:
    return funcol.wait_tensor(_gather_tensor(x.contiguous(), dim, group))


def reduce_scatter(x: Tensor, group: Any, dim: int = SEQUENCE) -> Tensor:
    return funcol.wait_tensor(_scatter_tensor(x.contiguous(), "sum", dim, group))


def _same(x: Tensor, group: Any) -> Tensor:
    return x.view_as(x)


def _pair(name: str, forward_of: Callable, backward_of: Callable) -> Callable[[Tensor, Axis], Tensor]:
    class Pair(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
            ctx.group = group
            return forward_of(x, group)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
            return backward_of(grads[0], ctx.group), None

    Pair.__name__ = Pair.__qualname__ = name

    def apply(x: Tensor, axis: Axis) -> Tensor:
        return x if axis.size == 1 else Pair.apply(x, axis.group)

    return apply


copy = _pair("Copy", _same, all_reduce)
"""Replicated input of a column-parallel product: its gradient is summed over the axis."""

reduce = _pair("Reduce", all_reduce, _same)
"""Output of a row-parallel product: partial sums are added."""

gather = _pair("Gather", all_gather, reduce_scatter)
"""`copy` under sequence parallelism: rows of the sequence are collected, their gradients summed and dealt out."""

scatter = _pair("Scatter", reduce_scatter, all_gather)
"""`reduce` under sequence parallelism: partial sums are added and dealt out over the sequence."""

total = _pair("Total", all_reduce, all_reduce)
"""Sum over the axis of which every rank makes further use of its own: the gradient that it gets is a sum as well."""


def _exchange(x: Tensor, group: Any, cut: int, join: int) -> Tensor:
    """Cut `x` along dimension `cut` into one part a rank, send each to its rank, and join what comes along `join`."""
    size = torch.distributed.get_world_size(group)
    parts = torch.stack(x.chunk(size, cut))  # [rank, ...]
    received = funcol.wait_tensor(funcol.all_to_all_single(parts, None, None, group))
    return torch.cat(received.unbind(), join)


def _all_to_all(cut: int, join: int) -> Callable[[Tensor, Any], Tensor]:
    return lambda x, group: _exchange(x, group, cut, join)


HEADS, TOKENS = 1, 2
"""Dimensions of [b, heads, t, k] that `to_heads` and `to_tokens` exchange."""

to_heads = _pair("ToHeads", _all_to_all(HEADS, TOKENS), _all_to_all(TOKENS, HEADS))
"""[b, h, t / size, k] -> [b, h / size, t, k]: from some tokens of all heads to all tokens of some heads."""

to_tokens = _pair("ToTokens", _all_to_all(TOKENS, HEADS), _all_to_all(HEADS, TOKENS))
"""[b, h / size, t, k] -> [b, h, t / size, k]: back."""


def start_all_gather(x: Tensor, axis: Axis) -> Tensor:
    """Begin to collect the rows of the sequence from all ranks of `axis`; `wait` for it."""
    return _gather_tensor(x.contiguous(), SEQUENCE, axis.group)


def start_reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """Begin to add up partial sums and to deal them out over the sequence; `wait` for it."""
    return _scatter_tensor(x.contiguous(), "sum", SEQUENCE, axis.group)


def start_all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """Begin to add up partial sums; `wait` for it."""
    group: Any = axis.group
    return funcol.all_reduce(x.contiguous(), "sum", group)


def start_shift(x: Tensor, axis: Axis) -> Tensor:
    """Begin to send x [n, ...] to the next rank of a ring and to receive what the previous one has; `wait` for it."""
    lengths = [0] * axis.size, [0] * axis.size
    lengths[0][(axis.rank - 1) % axis.size] = lengths[1][(axis.rank + 1) % axis.size] = x.shape[0]
    group: Any = axis.group
    return funcol.all_to_all_single(x.contiguous(), *lengths, group)


def wait(x: Tensor) -> Tensor:
    """What a collective that was begun has brought."""
    return funcol.wait_tensor(x)


def own_rows(x: Tensor, axis: Axis) -> Tensor:
    """This rank's rows of the sequence [b, t, ...] -> [b, t / size, ...]; no gradient crosses ranks."""
    return x if axis.size == 1 else x.chunk(axis.size, SEQUENCE)[axis.rank].contiguous()


def in_backward(x: Tensor, grad: Tensor) -> Tensor:
    """`x`, to be sent in backward as it was in forward.

    Of two equal calls the compiler makes one, and keeps what all ranks have brought until backward. So where it
    compiles this is a copy that it cannot make before `grad`, the gradient that backward is given.
    """
    return _not_before(x, grad) if torch.compiler.is_compiling() else x


@torch.library.custom_op("megatrain::not_before", mutates_args=())
def _not_before(x: Tensor, other: Tensor) -> Tensor:
    return x.clone()


@_not_before.register_fake
def _(x: Tensor, other: Tensor) -> Tensor:
    return x.clone()
