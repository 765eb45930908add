"""Where gradients are accumulated, and how they are summed over ranks: float32 throughout."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatrain.parallel.mesh import Axis
from megatrain.parallel.shard import Shard, shard_of

BUCKET_ELEMENTS = 2**24
"""Elements that are reduced at a time: 64 MiB, enough to hide the latency of a collective."""


class Gradients:
    """The float32 gradients of parameters, whatever format the parameters have.

    Those that are summed over ranks live in flat buffers, of which each `p.grad` is a view, so that reducing copies
    nothing. On one rank they are left to autograd, which keeps the first one it computes instead of adding it to zeros.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], data: Axis):
        self.parameters, self.data = parameters, data
        for p in parameters:
            p.grad_dtype = torch.float32
        self.buffers = [_buffer(bucket) for bucket in _buckets(parameters)] if data.size > 1 else []

    def reduce(self) -> None:
        """Sum over the ranks that have other rows of the batch."""
        works = [dist.all_reduce(flat, group=self.data.group, async_op=True) for flat in self.buffers]
        for work in works:
            work.wait()
        for p in self.parameters:
            if p.grad is None:  # it took no part in this loss; the optimiser must see the zero that this means
                p.grad = torch.zeros_like(p, dtype=torch.float32)

    def clear(self) -> None:
        for flat in self.buffers:
            flat.zero_()
        if not self.buffers:
            for p in self.parameters:
                p.grad = None


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    buckets: list[list[nn.Parameter]] = []
    filled = BUCKET_ELEMENTS
    for p in parameters:
        if filled >= BUCKET_ELEMENTS:
            buckets.append([])
            filled = 0
        buckets[-1].append(p)
        filled += p.numel()
    return buckets


def _buffer(parameters: list[nn.Parameter]) -> Tensor:
    sizes = [p.numel() for p in parameters]
    flat = torch.zeros(sum(sizes), dtype=torch.float32, device=parameters[0].device)
    for p, part in zip(parameters, flat.split(sizes), strict=True):
        p.grad = part.view_as(p)
    return flat


def sum_partial(held: Iterable[tuple[Shard, Tensor, int]], tp: Axis) -> None:
    """Sum over tensor-parallel ranks, in place, the gradients of which each has a part.

    Those are copies under sequence parallelism (norm gains, biases), which all ranks hold and one collective carries,
    and the weights of key and value heads that some neighbours hold where there are fewer heads than ranks.

    Args:
        held: of each parameter its shard, a flat range of its gradient, and where that range begins.
    """
    pieces: dict[int, list[Tensor]] = {}  # by the number of ranks that share them
    for shard, flat, start in held:
        if not shard.partial:
            continue
        for piece in shard.boxes(start, flat.numel()):
            sharers = tp.size if shard.summed_over_tp else piece.shared
            if sharers > 1:
                pieces.setdefault(sharers, []).append(flat.narrow(0, piece.offset, piece.box.numel))
    for sharers, shared in sorted(pieces.items()):
        if sharers == tp.size:
            sum_over(shared, tp)
        else:
            _sum_over_neighbours(shared, tp, sharers)


def gradients_of(parameters: Iterable[nn.Parameter]) -> Iterator[tuple[Shard, Tensor, int]]:
    """What `sum_partial` takes, of parameters whose whole gradient is here."""
    return ((shard_of(p), p.grad.view(-1), 0) for p in parameters if p.grad is not None)


def gradients_by_name(named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradients of those parameters that have one."""
    return {name: p.grad for name, p in named.items() if p.grad is not None}


def sum_over(gradients: Sequence[Tensor], axis: Axis) -> None:
    """Sum each of `gradients` over the ranks of `axis`, in place, in one collective."""
    if axis.size == 1 or not gradients:
        return
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat, group=axis.group)
    for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        g.copy_(part.view_as(g))


def _sum_over_neighbours(gradients: Sequence[Tensor], axis: Axis, n: int) -> None:
    """The same over every `n` neighbouring ranks of `axis`: the same bits on each of them.

    Each sends to its neighbours only, and all add up in the order of ranks; so no group of its own is needed.
    """
    flat = torch.cat([g.flatten() for g in gradients])
    first = axis.rank // n * n
    lengths = [len(flat) if first <= rank < first + n else 0 for rank in range(axis.size)]
    sent = flat.repeat(n)
    parts = torch.empty_like(sent)
    dist.all_to_all_single(parts, sent, lengths, lengths, group=axis.group)
    total = parts.view(n, -1).sum(0)
    for g, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
        g.copy_(part.view_as(g))
