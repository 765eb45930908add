"""Token embedding cut over the vocabulary: each tensor-parallel rank holds some of the rows."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.parallel.product import float32_gradient
from megatrain.parallel.shard import Init, Part, Shard, parameter
from megatrain.parallel.tensor import TensorParallel


def vocabulary_shard(vocab_size: int, d_model: int, tp: TensorParallel, init: Init, *, counted: bool = True) -> Shard:
    """[v, d] cut over v. The vocabulary need not divide: some ranks hold one row more."""
    return Shard((vocab_size, d_model), init, 0, (Part(*tp.rows(vocab_size), counted=counted),))


class VocabParallelEmbedding(nn.Module):
    """tokens [b, t] -> [b, t, d] (or [b, t / size, d] under sequence parallelism).

    Args:
        counted: another rank holds the same rows where it is False (see `parallel.shard.Part`).
    """

    def __init__(self, vocab_size: int, d_model: int, tp: TensorParallel, *, init: Init, counted: bool = True):
        super().__init__()
        self.tp = tp
        self.weight = parameter(vocabulary_shard(vocab_size, d_model, tp, init, counted=counted))
        self.first, self.stop = tp.rows(vocab_size)
        self.look_up: Callable[[Tensor, Tensor], Tensor] = F.embedding
        """Rows of the weight: [b, t], [v, d] -> [b, t, d]."""

    def forward(self, tokens: Tensor) -> Tensor:
        if self.tp.size == 1:
            return self.look_up(tokens, self.weight)
        absent = (tokens < self.first) | (tokens >= self.stop)
        local = (tokens - self.first).masked_fill(absent, 0)
        return self.tp.leave(self.look_up(local, self.weight).masked_fill(absent[..., None], 0.0))


class UsedRows:
    """A `look_up` whose backward adds to the rows of the weight's gradient that were used, in float32.

    Autograd would make a gradient of the whole vocabulary for each micro-batch, zeros nearly all of it, and add that.
    """

    def __init__(self, layer: VocabParallelEmbedding):
        self.layer = layer

    def __call__(self, tokens: Tensor, weight: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or not weight.requires_grad:
            return F.embedding(tokens, weight)
        return _UsedRows.apply(tokens, weight, self.layer)


class _UsedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, layer: Any) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.layer = layer
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        (tokens,), weight = ctx.saved_tensors, ctx.layer.weight
        add_to_rows(float32_gradient(weight), tokens.flatten(), grads[0].flatten(0, -2))
        return None, None, None


def add_to_rows(total: Tensor, rows: Tensor, values: Tensor) -> None:
    """total[rows[i]] += values[i] for each i: [v, d], [n], [n, d], the same bits every time and without waiting.

    Values of one row are added up first, each row in a place of its own, so that the last addition meets no row twice.
    """
    n = rows.shape[0]
    ordered, order = rows.sort()
    another = ordered.diff(prepend=ordered[:1]) != 0
    place = torch.empty_like(rows).scatter_(0, order, another.cumsum(0))
    sums = torch.ops.aten.embedding_dense_backward(values.to(total.dtype), place, n, -1, False)
    total.index_add_(0, torch.zeros_like(rows).scatter_(0, place, rows), sums)  # places that are left add 0 to row 0
