"""Ring attention: keys and values travel round the ranks, while each rank's queries stay (Liu et al. 2023,
arXiv:2310.01889).

Each rank attends to one rank's keys at a time. A softmax over some of the keys and the logarithm of its sum of
exponentials are enough to merge parts exactly (Milakov and Gimelshein 2018, arXiv:1805.02867), so no rank ever holds
the keys of a whole row, and any number of heads will do. While one part is computed the next one travels.

A row is cut into 2 x size chunks, of which rank r computes chunks r and 2 x size - 1 - r. So under a causal mask every
rank has the same work: against its own keys the triangle; against an earlier rank's all queries see the first half
of the keys and none of the second; against a later rank's the second half of the queries sees all keys, the first none.

| step | queries | keys | of rank |
|---|---|---|---|
| 0 | all | all, causally | its own |
| 1 to r | all | first half | r - step |
| r + 1 to size - 1 | second half | all | r - step + size |
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatrain.nn.attention.kernel import as_products, attend_part, attend_part_backward
from megatrain.nn.context import CONTEXT
from megatrain.nn.where import Where
from megatrain.parallel.collectives import in_backward, start_shift, wait
from megatrain.parallel.mesh import ALONE, Axis, divisors

TIME = 2
"""The dimension of tokens in [b, h, t, k]."""


@CONTEXT.register("ring")
@dataclass(frozen=True)
class Ring:
    axis: Axis = ALONE

    def columns(self, seq_len: int) -> tuple[tuple[int, int], ...]:
        """Tokens [start, stop) of each row that this rank computes."""
        return ((0, seq_len),) if self.axis.size == 1 else columns_of(self.axis.rank, self.axis.size, seq_len)

    def prepare(self, kind: Any, whole: Where) -> Any:
        """The masks of a pass, one for each step [b, 1, queries, keys]; None where plain causal attention is asked."""
        if self.axis.size == 1:
            return kind.prepare(whole)
        seq_len = whole.positions.shape[1]
        if kind.plain(whole.packed, seq_len):
            return None
        mine = columns_of(self.axis.rank, self.axis.size, seq_len)
        masks = []
        for step in steps_of(self.axis.rank, self.axis.size):
            queries, keys = (
                _chosen(mine, step.queries),
                _chosen(columns_of(step.source, self.axis.size, seq_len), step.keys),
            )
            masks.append(_visible(kind, whole, queries, keys))
        return tuple(masks)

    def attend(self, kind: Any, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor:
        """q [b, h, t / size, k], k and v [b, g, t / size, k] -> [b, h, t / size, k]."""
        if self.axis.size == 1:
            return kind.attend(q, k, v, where)
        asked = q.dtype
        q, k, v = as_products(q, k, v)
        masks = (None,) * self.axis.size if where.mask is None else where.mask
        with torch.autocast(q.device.type, enabled=False):
            return _RingAttention.apply(q, k, v, self.axis, *masks).to(asked)

    @staticmethod
    def length_problems(seq_len: int, size: int) -> list[str]:
        """Why rows of `seq_len` tokens cannot be cut over `size` ranks."""
        if size == 1 or seq_len % (2 * size) == 0:
            return []
        fits = [1, *divisors(seq_len // 2)] if seq_len % 2 == 0 else [1]
        return [
            f"data.seq_len={seq_len} cannot be cut into 2 x cp = {2 * size} equal chunks, two a rank: pick cp from "
            f"{sorted(set(fits))}, make data.seq_len a multiple of {2 * size}, or set layout.cp_kind=ulysses"
        ]

    @staticmethod
    def head_problems(kind: Any, n_heads: int, n_kv_heads: int, tp: int, size: int) -> list[str]:
        """Why attention of `kind` with so many heads, cut over `tp`, cannot be shared by `size` ranks."""
        if getattr(kind, "blockwise", False):
            return []
        return [
            f"attention {kind.kind} cannot be put together from parts over some of the keys, as a ring of cp={size} "
            "does: set layout.cp_kind=ulysses"
        ]


# ------------------------------------------------------------------------------------------------ who computes what


def columns_of(rank: int, size: int, seq_len: int) -> tuple[tuple[int, int], ...]:
    """The two chunks [start, stop) of a row of `seq_len` tokens that `rank` computes."""
    each = seq_len // (2 * size)
    late = 2 * size - 1 - rank
    return (rank * each, (rank + 1) * each), (late * each, (late + 1) * each)


ALL, FIRST, SECOND = (0, 1), (0,), (1,)
"""Chunks of a rank's two."""


@dataclass(frozen=True)
class Step:
    """One part of the work: chunks of this rank's queries against chunks of the keys of rank `source`."""

    source: int
    queries: tuple[int, ...] = ALL
    keys: tuple[int, ...] = ALL
    causal: bool = False
    """Queries and keys are the same tokens; elsewhere all of them are visible as far as causality goes."""


def steps_of(rank: int, size: int) -> Iterator[Step]:
    """What `rank` computes, in the order in which keys reach it."""
    yield Step(rank, causal=True)
    for i in range(1, size):
        source = (rank - i) % size
        yield Step(source, keys=FIRST) if source < rank else Step(source, queries=SECOND)


def _chosen(columns: tuple[tuple[int, int], ...], chunks: tuple[int, ...]) -> list[tuple[int, int]]:
    return [columns[i] for i in chunks]


def _visible(kind: Any, whole: Where, queries: list[tuple[int, int]], keys: list[tuple[int, int]]) -> Tensor:
    """Which of the tokens `keys` each of the tokens `queries` of the rows sees: bool [b, 1, t, s]."""

    def of(x: Tensor, ranges: list[tuple[int, int]]) -> Tensor:
        return torch.cat([x[:, start:stop] for start, stop in ranges], 1)

    q, k = of(whole.positions, queries)[:, :, None], of(whole.positions, keys)[:, None, :]
    same = of(whole.documents, queries)[:, :, None] == of(whole.documents, keys)[:, None, :]
    return (kind.visible(q, k) & same)[:, None]


def _part(x: Tensor, chunks: tuple[int, ...]) -> Tensor:
    """Chunks of the two in [..., t, k] or [..., t]: a view."""
    return x if chunks == ALL else x.chunk(2, TIME)[chunks[0]]


# ------------------------------------------------------------------------------------------------ the ring


class _RingAttention(torch.autograd.Function):
    """Forward merges parts in float32; backward lets keys travel once more, with their gradients behind them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, axis: Axis, *masks: Tensor | None) -> Tensor:
        own = torch.stack([k, v])  # they travel together
        total = torch.empty_like(q, dtype=torch.float32)
        lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
        here, coming = own, own
        for i, step in enumerate(steps_of(axis.rank, axis.size)):
            if i + 1 < axis.size:
                coming = start_shift(here, axis)
            keys, values = _part(here[0], step.keys), _part(here[1], step.keys)
            y, part_lse = attend_part(_part(q, step.queries), keys, values, masks[i], causal=step.causal)
            if i == 0:  # here each query sees itself, so its sum of exponentials is never 0 again
                total.copy_(y)
                lse.copy_(part_lse)
            else:
                _merge(_part(total, step.queries), _part(lse, step.queries), y, part_lse)
            if i + 1 < axis.size:
                here = wait(coming)
        y = total.to(q.dtype)
        ctx.axis = axis
        ctx.save_for_backward(q, own, y, lse, *masks)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, own, y, lse, *masks = ctx.saved_tensors
        axis = ctx.axis
        grad_q = torch.zeros_like(q, dtype=torch.float32)
        here = coming = in_backward(own, grads[0])
        behind = torch.zeros_like(own, dtype=torch.float32)  # gradients of the keys and values that are `here`
        for i, step in enumerate(steps_of(axis.rank, axis.size)):
            if i + 1 < axis.size:
                coming = start_shift(here, axis)
            keys, values = _part(here[0], step.keys), _part(here[1], step.keys)
            grad, queries, out, sums = (_part(x, step.queries) for x in (grads[0], q, y, lse))
            of_q, of_k, of_v = attend_part_backward(
                grad, queries, out, sums, keys, values, masks[i], causal=step.causal
            )
            _part(grad_q, step.queries).add_(of_q)
            if i > 0:
                behind = wait(behind)
            _part(behind[0], step.keys).add_(of_k)
            _part(behind[1], step.keys).add_(of_v)
            behind = start_shift(behind, axis)
            if i + 1 < axis.size:
                here = wait(coming)
        grad_k, grad_v = wait(behind).to(own.dtype).unbind()  # they are home again
        return grad_q.to(q.dtype), grad_k, grad_v, None, *(None for _ in masks)


def _merge(total: Tensor, lse: Tensor, y: Tensor, part_lse: Tensor) -> None:
    """Take another part into `total` [b, h, t, k], float32, and its log-sum-exp `lse` [b, h, t]."""
    both = torch.logaddexp(lse, part_lse)
    total.mul_((lse - both).exp()[..., None]).add_(y * (part_lse - both).exp()[..., None])
    lse.copy_(both)
