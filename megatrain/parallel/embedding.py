"""Token embedding cut over the vocabulary: each tensor-parallel rank holds some of the rows."""

import torch.nn.functional as F
from torch import Tensor, nn

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

    def forward(self, tokens: Tensor) -> Tensor:
        if self.tp.size == 1:
            return F.embedding(tokens, self.weight)
        absent = (tokens < self.first) | (tokens >= self.stop)
        local = (tokens - self.first).masked_fill(absent, 0)
        return self.tp.leave(F.embedding(local, self.weight).masked_fill(absent[..., None], 0.0))
