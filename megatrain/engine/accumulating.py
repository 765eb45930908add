"""Weight gradients added up inside the matrix product that makes them.

Left to itself autograd makes each micro-batch's gradient of a weight in the format of the weight, then casts it and
adds it to the float32 sum: for bf16 weights on a GPU that is 10 bytes of traffic a parameter and micro-batch, and one
rounding. A product can add to its result for nothing. So the linears leave their weight gradient to a queue, as they
do for zero-bubble pipelines, and this queue pays as soon as it is owed. The head adds its own on the way forward, the
embedding to the rows that were used.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.engine.api import Parts
from megatrain.engine.passes import Passes, factor_of
from megatrain.engine.pipeline import passes_of
from megatrain.models.block import Block
from megatrain.models.head import Head
from megatrain.nn.batch import Batch
from megatrain.parallel.cross_entropy import AddedAtOnce
from megatrain.parallel.deferred import DeferredProduct, Owed, WeightGradientQueue, defer_weight_gradients
from megatrain.parallel.embedding import UsedRows, VocabParallelEmbedding


def accumulating(parts: Parts) -> bool:
    """Whether it pays: on a GPU in bf16, without pipeline and tensor-parallel ranks.

    Those have another use for a weight's product: it hides a bubble, or a collective.
    """
    alone = parts.pipeline is None and parts.mesh.axis("tp").size == 1
    return alone and parts.device.kind == "cuda" and parts.precision.compute == "bf16"


def plain_passes(parts: Parts) -> Passes:
    """How an engine runs its model whose gradients stay whole on every rank."""
    if not accumulating(parts):
        return passes_of(parts, parts.mesh)
    return AccumulatingPasses(
        model=parts.model,
        data=parts.mesh.axis("data"),
        micro_batch=parts.micro_batch,
        device=parts.device.torch,
        autocast=parts.precision.autocast,
        dtype=torch.bfloat16,
    )


class PaidAtOnce(WeightGradientQueue):
    """Owes nothing for longer than the backward of one block."""

    def add(self, owed: Owed) -> None:
        owed.pay()


@dataclass(frozen=True, kw_only=True)
class AccumulatingPasses(Passes):
    dtype: torch.dtype
    """What products are asked in."""
    _heads: list[AddedAtOnce] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        for layer in self.model.modules():
            if isinstance(layer, Block):
                layer.register_forward_pre_hook(Taps(defer_weight_gradients(layer, PaidAtOnce())[1], self.dtype))
            elif isinstance(layer, VocabParallelEmbedding):
                layer.look_up = UsedRows(layer)
            elif isinstance(layer, Head):
                layer.loss = AddedAtOnce(layer)
                self._heads.append(layer.loss)

    def forward_backward(self, batch: Batch, divisor: Tensor, backward: Any = None) -> Tensor:
        """As `Passes` do it; a `backward` of one's own is refused, since the head's gradient is there before it."""
        if backward is not None:
            raise TypeError("weight gradients that are added up in their product take no backward of one's own")
        for head in self._heads:
            head.factor = factor_of(divisor)
        try:
            return super().forward_backward(batch, divisor)
        finally:
            for head in self._heads:
                head.factor = None


@dataclass(frozen=True)
class Taps:
    """Hook that taps the products of a block just before its forward.

    Of what is ready backward runs first what was made last. So taps that were made for all blocks at once would be paid
    after all blocks, and every gradient of an output would be kept until then.
    """

    products: list[DeferredProduct]
    dtype: torch.dtype

    def __call__(self, block: nn.Module, args: tuple[Tensor, Any]) -> None:
        b, t, _ = args[0].shape
        for product in self.products:
            if torch.is_grad_enabled():
                product.tap(b, t, self.dtype, args[0].device)
            else:
                product.untap()
