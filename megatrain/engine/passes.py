"""Forward and backward over the micro-batches of a step: what every engine does alike."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatrain.nn.batch import Batch
from megatrain.parallel.mesh import Axis


def summed(x: Tensor, axis: Axis) -> Tensor:
    """`x` summed over the ranks of `axis`, a tensor of its own."""
    x = x.clone()
    if axis.size > 1:
        dist.all_reduce(x, group=axis.group)
    return x


def mean(total: Tensor, tokens: Tensor) -> Tensor:
    """`total` per token, and 0 where there are none."""
    return torch.where(tokens > 0, total / tokens, 0.0)


def factor_of(divisor: Tensor) -> Tensor:
    """What loss sums are multiplied by before their backward: 1 / divisor, and 0 where that is 0."""
    return mean(torch.ones_like(divisor), divisor)


@dataclass(frozen=True)
class Passes:
    """Runs a model over this rank's rows of global batches."""

    model: nn.Module
    data: Axis
    """Ranks that hold other rows of the same batch."""
    micro_batch: int
    device: torch.device
    autocast: torch.dtype | None = None
    """What matrix products take where parameters are kept in another format."""

    def number_format(self) -> contextlib.AbstractContextManager:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    def global_tokens(self, batch: Batch) -> Tensor:
        """Sum of the target weights of the global batch: known before any forward, so that one division is enough."""
        return summed(batch.weights.sum(dtype=torch.float32), self.data)

    def forward_backward(
        self,
        batch: Batch,
        divisor: Tensor,
        backward: Callable[[Tensor, bool], None] = lambda loss, last: loss.backward(),
    ) -> Tensor:
        """Add the gradients of (loss sum / divisor) of every micro-batch to the parameters'; return the loss sum.

        Args:
            divisor: scalar on the device; a sum of losses over nothing stays 0 whatever it is.
            backward: called with the divided loss of each micro-batch, and whether it is the last.
        """
        factor = factor_of(divisor)
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        remaining = batch.rows
        for micro in batch.split(self.micro_batch):
            remaining -= micro.rows
            loss_sum = self.loss_sum(micro)
            backward(loss_sum * factor, remaining == 0)
            total += loss_sum.detach()
        return total

    def loss_sum(self, micro: Batch) -> Tensor:
        """The forward of one micro-batch."""
        with self.number_format():
            loss_sum, _ = self.model(micro)
        return loss_sum

    def sum_tied(self, gradients: Mapping[str, Tensor]) -> None:
        """Sum the gradients, by name, of parameters that other ranks of a pipeline have a copy of: none here."""

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(loss sum, token count) over all ranks' rows. Ranks bring equally many rows: their forwards run together."""
        batch = batch.to(self.device)
        total = torch.zeros(2, dtype=torch.float32, device=self.device)
        training = self.model.training
        self.model.eval()
        try:
            for micro in batch.split(self.micro_batch):
                with self.number_format():
                    total += torch.stack(self.model(micro))
        finally:
            self.model.train(training)
        loss_sum, count = summed(total, self.data).unbind()
        return loss_sum, count
