"""The output head of a decoder, with the loss."""

from collections.abc import Callable

from torch import Tensor, nn

from megatrain.parallel.cross_entropy import linear_cross_entropy
from megatrain.parallel.embedding import vocabulary_shard
from megatrain.parallel.shard import normal, parameter
from megatrain.parallel.tensor import TensorParallel


class Head(nn.Module):
    """The output projection: rows of [v, d], cut over tensor-parallel ranks; tied, it holds the embedding's weight."""

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        tp: TensorParallel,
        init_std: float,
        tied: nn.Parameter | None,
        z_loss: float,
    ):
        super().__init__()
        self.tp, self.z_loss = tp, z_loss
        shard = vocabulary_shard(vocab_size, d_model, tp, normal(init_std))
        self.weight = parameter(shard) if tied is None else tied
        self.first = shard.parts[0].start
        self.loss: Callable[..., Tensor] = linear_cross_entropy

    def forward(self, hidden: Tensor, targets: Tensor, weights: Tensor, n_valid: int) -> Tensor:
        """Sum of weighted token losses of hidden [b, t or t / size, d]."""
        hidden = self.tp.enter(hidden).flatten(0, 1)
        return self.loss(
            hidden,
            self.weight,
            targets.flatten(),
            weights.flatten(),
            axis=self.tp.axis,
            first=self.first,
            n_valid=n_valid,
            z_loss=self.z_loss,
        )
