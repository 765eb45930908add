"""Weight gradients that wait: a linear's backward gives the gradient of its input at once and owes that of its weight.

Zero-bubble pipeline schedules (Qi et al. 2023, arXiv:2401.10241) run the two apart. Autograd cannot split a compiled
block, which is one node to it; so the linears do it themselves. Each gets two *taps*: inputs of the shapes of its
input and its output that take no memory. In backward it hands out its saved input as the gradient of the first and the
gradient of its output as that of the second. So both leave a compiled backward as ordinary gradients, which the
compiler must keep, and reach `_Tap.backward` in eager autograd, which queues them. No graph has a side effect.

Norms, biases, the embedding and the head, whose gradient is known as soon as its loss is, are not deferred.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatrain.parallel.product import add_product, float32_product, linear, multiply
from megatrain.parallel.shard import shard_of


@dataclass(frozen=True)
class Owed:
    """One product that is yet to be added to a weight's gradient: grad^T x."""

    layer: nn.Module
    x: Tensor
    """[..., i]"""
    grad: Tensor
    """[..., o]"""

    @torch.no_grad()
    def pay(self) -> None:
        # The weight is looked up only now: an engine that shards may have held another Parameter before.
        weight: Any = self.layer.weight
        x, grad = self.x.flatten(0, -2), self.grad.flatten(0, -2)
        if weight.grad is not None:
            add_product(weight.grad, grad, x)
            return
        if weight.dtype != torch.float32:
            weight.grad_dtype = torch.float32
        product = float32_product(grad, x)
        if weight.shape == product.shape:
            weight.grad = product
        else:  # ZeRO-3 has released the weight, which is empty now, and expects a whole gradient: lend it the shape
            released, weight.data = weight.data, product.to(weight.dtype)
            weight.grad, weight.data = product, released


class WeightGradientQueue:
    """What the linears of one stage owe after its backward."""

    def __init__(self) -> None:
        self._owed: list[Owed] = []

    def add(self, owed: Owed) -> None:
        self._owed.append(owed)

    def take(self) -> Callable[[], None]:
        """Take over what is owed now; calling the result pays it, and frees each pair as it is paid."""
        owed, self._owed = self._owed, []

        def pay() -> None:
            while owed:
                owed.pop(0).pay()

        return pay


class DeferredProduct:
    """The product of one linear, whose weight gradient is put into a queue wherever `taps` are set.

    A `Product` like any other. Without taps (in evaluation) it is `linear`.
    """

    def __init__(self, layer: nn.Module, queue: WeightGradientQueue):
        self.layer, self.queue = layer, queue
        self.widths = shard_of(layer.weight).local_shape[::-1]  # type: ignore[arg-type]
        """(i, o), asked before an engine shards or releases the weight."""
        self.taps: tuple[Tensor, Tensor] | None = None
        self._constants: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def tap(self, b: int, t: int, dtype: torch.dtype, device: torch.device) -> None:
        """Fresh taps for the next input [b, t, i]; `dtype` is what products are asked in.

        They stay until others come, since recomputation runs a forward again in backward: it only needs some of the
        same shape, as the gradients go through the first forward's.
        """
        i, o = self.widths
        if (dtype, device) not in self._constants:  # made once: on a GPU each is a launch
            one = torch.ones((), device=device, requires_grad=True)  # lets the taps have gradients; gets none itself
            self._constants[dtype, device] = one, torch.zeros((), dtype=dtype, device=device)
        one, form = self._constants[dtype, device]
        self.taps = _Tap.apply(one, form, (b, t, i), (b, t, o), self)

    def untap(self) -> None:
        self.taps = None

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.taps is None or not weight.requires_grad:
            return linear(x, weight, bias)
        return _Deferred.apply(x, weight, bias, *self.taps)


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, one: Tensor, form: Tensor, x: tuple, y: tuple, product: DeferredProduct) -> Any:
        ctx.product = product
        return form.expand(x), form.expand(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        ctx.product.queue.add(Owed(ctx.product.layer, *grads))
        return None, None, None, None, None


class _Deferred(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tap_x: Tensor, tap_y: Tensor) -> Tensor:
        ctx.save_for_backward(x.to(tap_x.dtype), weight)
        ctx.formats = x.dtype, None if bias is None else bias.dtype
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), grad = ctx.saved_tensors, grads[0]
        x_format, bias_format = ctx.formats
        grad_x = multiply(grad, weight.to(grad.dtype)).to(x_format)
        grad_bias = None if bias_format is None else grad.flatten(0, -2).sum(0, dtype=torch.float32).to(bias_format)
        return grad_x, None, grad_bias, x, grad


def defer_weight_gradients(
    stage: nn.Module, queue: WeightGradientQueue | None = None
) -> tuple[WeightGradientQueue, list[DeferredProduct]]:
    """Make the linears of `stage` put their weight gradients into the queue that is returned, a new one by default.

    Those whose product is not the plain one keep theirs in backward. The products are to be tapped before each forward.
    """
    # the compiler looks at `.grad` of every input of a block, and taps are no leaves
    warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)
    queue, products = queue or WeightGradientQueue(), []
    for module in stage.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear) and module.product is linear:
            module.product = DeferredProduct(module, queue)
            products.append(module.product)
    return queue, products
