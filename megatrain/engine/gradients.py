"""Where gradients are accumulated, and how they are summed over ranks: float32 throughout."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatrain.parallel.mesh import Axis
from megatrain.parallel.shard import Shard

BUCKET_ELEMENTS = 2**24
"""Elements that are reduced at a time: 64 MiB, enough to hide the latency of a collective."""


class Gradients:
    """The float32 gradients of named parameters, whatever format the parameters have.

    Gradients that are summed over ranks live in flat buffers, of which each `p.grad` is a view: reducing copies
    nothing. The others are left to autograd, which keeps the first one it computes instead of adding it to zeros.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], shards: Mapping[str, Shard], data: Axis, tp: Axis):
        self.named, self.data, self.tp = named, data, tp
        for p in named.values():
            p.grad_dtype = torch.float32
        partial = [n for n in named if shards[n].summed_over_tp and tp.size > 1]
        others = [n for n in named if n not in set(partial)] if data.size > 1 else []
        self.partial = [self._buffer(names) for names in self._buckets(partial)]
        """Buffers whose content each tensor-parallel rank has a part of."""
        self.buffers = self.partial + [self._buffer(names) for names in self._buckets(others)]
        self.loose = [named[n] for n in named if n not in {*partial, *others}]

    def _buckets(self, names: list[str]) -> list[list[str]]:
        buckets: list[list[str]] = []
        filled = BUCKET_ELEMENTS
        for name in names:
            if filled >= BUCKET_ELEMENTS:
                buckets.append([])
                filled = 0
            buckets[-1].append(name)
            filled += self.named[name].numel()
        return buckets

    def _buffer(self, names: list[str]) -> Tensor:
        parameters = [self.named[n] for n in names]
        flat = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float32, device=parameters[0].device)
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)
        return flat

    def reduce(self) -> None:
        """Sum over tensor-parallel ranks what is partial there, then everything over the ranks with other rows."""
        for flat in self.partial:
            dist.all_reduce(flat, group=self.tp.group)
        if self.data.size > 1:
            works = [dist.all_reduce(flat, group=self.data.group, async_op=True) for flat in self.buffers]
            for work in works:
                work.wait()
        for p in self.loose:
            if p.grad is None:  # it took no part in this loss; the optimiser must see the zero that this means
                p.grad = torch.zeros_like(p, dtype=torch.float32)

    def clear(self) -> None:
        for flat in self.buffers:
            flat.zero_()
        for p in self.loose:
            p.grad = None
