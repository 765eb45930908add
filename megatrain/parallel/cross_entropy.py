"""The output head and its loss in one, so that the logits of all tokens never exist at once.

Rows are taken in chunks. Since the loss is a plain sum, its gradient with respect to the logits of a chunk is known as
soon as they are: softmax minus one-hot, times the target's weight. So the gradients of hidden states and head are made
on the way forward, and backward only scales them; where the factor is known beforehand, that of the head is added to
what is there at once (`AddedAtOnce`). Under tensor parallelism each rank holds some columns of the logits, and three
numbers a token cross ranks: the largest logit, the sum of exponentials, the target's logit.
"""

from typing import Any

import torch
from torch import Tensor

from megatrain.parallel.collectives import all_reduce
from megatrain.parallel.mesh import Axis
from megatrain.parallel.product import add_product, by_float32, float32_gradient, product_format

CHUNK_BYTES = 8 * 2**20
"""Memory of one chunk of float32 logits: large enough for good products, small beside a model."""

CACHE_BYTES = 4 * 2**20
"""What stands between the products of a chunk is done for so much of it at a time, which stays in a CPU's cache."""

GPU_CHUNK_BYTES = 2 * 2**30
"""On a GPU larger chunks make better products; in bf16 they take half of this."""


TILE_ROWS = 128
"""Of a tile of a matrix product: whole ones waste nothing."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    axis: Axis,
    first: int,
    n_valid: int,
    z_loss: float = 0.0,
    at_once: "AddedAtOnce | None" = None,
) -> Tensor:
    """Sum over tokens of weight x cross-entropy of softmax(hidden W^T), in nats.

    Args:
        hidden: [n, d], the same on every rank of `axis`; its gradient is a partial sum there.
        weight: [v / size, d], this rank's rows of the head.
        targets: int64 [n], in the numbering of the whole vocabulary.
        weights: float32 [n].
        axis: the tensor-parallel axis.
        first: number of this rank's first row.
        n_valid: size of the tokenizer's vocabulary; rows of the head beyond it are padding and take no part.
        z_loss: gradients are those of the loss and of z_loss x weight x log(sum of exponentials)^2, which keeps logits
            from drifting (Chowdhery et al. 2022, arXiv:2204.02311, section 5). The value is the loss alone, so that
            runs with and without can be compared.
        at_once: adds the gradient of `weight` to its sum, which autograd is then not told.

    Returns:
        float32 scalar.
    """
    n_local = max(0, min(weight.shape[0], n_valid - first))
    rows = chunk_rows(n_valid, axis.size, hidden.device.type)
    return _LinearCrossEntropy.apply(hidden, weight, targets, weights, axis, first, n_local, rows, z_loss, at_once)


class AddedAtOnce:
    """A head's loss that adds the gradient of the weight to the sum of those before, in the products that make it.

    Through autograd each micro-batch would have a gradient of its own, as large as the head in float32, that backward
    scales and then adds: 20 bytes of traffic a parameter. Backward has nothing left to scale here.
    """

    def __init__(self, layer: Any):
        self.layer = layer
        """Its `weight` is what the gradient is of."""
        self.factor: Tensor | None = None
        """What the loss is multiplied by before its backward; where that is not known, autograd does its part."""

    def __call__(self, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, **how: Any) -> Tensor:
        adds = self.factor is not None and torch.is_grad_enabled() and weight.requires_grad
        return linear_cross_entropy(hidden, weight, targets, weights, **how, at_once=self if adds else None)

    def scaled(self, weights: Tensor) -> Tensor:
        assert self.factor is not None
        return weights * self.factor

    def total(self) -> Tensor:
        """The sum that is added to, float32 [v, d]."""
        return float32_gradient(self.layer.weight)


def chunk_rows(n_valid: int, size: int, device: str) -> int:
    """Tokens whose logits exist at once: the same on every rank, however many columns it holds."""
    limit = CHUNK_BYTES if device == "cpu" else GPU_CHUNK_BYTES
    rows = max(1, limit * size // (4 * n_valid))
    return rows - rows % TILE_ROWS if rows > TILE_ROWS else rows


def reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, *, n_valid: int, z_loss: float = 0.0
) -> Tensor:
    """The same on one rank, the plain way: all logits at once. Here the z-loss is a part of the value."""
    logits = (hidden @ weight[:n_valid].T).float()
    squares = z_loss * logits.logsumexp(-1).square()
    return ((torch.nn.functional.cross_entropy(logits, targets, reduction="none") + squares) * weights).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        axis: Axis,
        first: int,
        n_local: int,
        rows: int,
        z_loss: float,
        at_once: AddedAtOnce | None,
    ) -> Tensor:
        device = hidden.device.type
        asked = product_format(hidden)
        dtype = torch.float32 if by_float32(hidden) else asked
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        chunk = _chunk if device == "cpu" else _chunk_on_gpu
        with torch.autocast(device, enabled=False):
            head = weight[:n_local].to(asked).to(dtype)
            total = hidden.new_zeros((), dtype=torch.float32)
            grad_hidden = torch.empty_like(hidden) if needs_grad else None
            grad_weight, pull = None, weights
            if at_once is not None:
                grad_weight, pull = at_once.total(), at_once.scaled(weights)
            elif needs_grad:
                grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=hidden.device)
            for begin in range(0, hidden.shape[0], rows):
                here = slice(begin, begin + rows)
                x = hidden[here].to(asked).to(dtype)
                losses, grad, scale = chunk(x, head, targets[here], pull[here], axis, first, needs_grad, z_loss)
                total += (losses * weights[here]).sum()
                if grad_hidden is not None and grad_weight is not None:
                    grad_x = grad @ head
                    grad_hidden[here] = grad_x if scale is None else grad_x.mul_(scale)
                    add_product(grad_weight[:n_local], grad, x if scale is None else (x * scale).to(dtype))
                del grad  # or the next chunk would be made beside it
        if needs_grad:
            ctx.save_for_backward(grad_hidden, None if at_once is not None else grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_weight is None:  # both are scaled already
            return grad_hidden, *[None] * 9
        return grad_hidden.mul_(grads[0]), grad_weight.mul_(grads[0]), *[None] * 8


def _chunk(
    x: Tensor, head: Tensor, targets: Tensor, pull: Tensor, axis: Axis, first: int, needs_grad: bool, z_loss: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(losses [n] of a chunk; gradient [n, v] of their sum, weighted with `pull`, with respect to its logits; scale
    [n, 1] that this is yet to be given).

    The scale, pull / sum of exponentials, is left to the much smaller factors of the products that follow.
    """
    n, n_local = x.shape[0], head.shape[0]
    logits = x @ head.T
    rows = max(1, CACHE_BYTES // (4 * max(n_local, 1)))
    highest = [part.amax(-1) for part in logits.split(rows)] if n_local else [logits.new_full((n,), -torch.inf)]
    top = _over_ranks(torch.cat(highest).float(), axis, "max")
    absent = (targets < first) | (targets >= first + n_local)
    of_targets = torch.arange(n), (targets - first).masked_fill(absent, 0)
    hit = logits[of_targets].sub(top).masked_fill(absent, 0.0) if n_local else torch.zeros_like(top)
    totals = []
    for part, its_top in zip(logits.split(rows), top.split(rows), strict=True):
        exponentials = part.float().sub_(its_top[:, None]).exp_()
        totals.append(exponentials.sum(-1))
        if exponentials is not part:
            part.copy_(exponentials)
    total, hit = _over_ranks(torch.stack([torch.cat(totals), hit]), axis, "sum").unbind()
    losses = total.log() - hit
    of_target = hit.exp()
    if z_loss:  # the gradient of log^2 is twice log times softmax
        more = 1 + 2 * z_loss * (total.log() + top)
        logits *= more[:, None]
        of_target *= more
    if n_local:  # written, not subtracted: what is left of a likely target is smaller than bf16's steps near it
        new = (of_target - total).to(logits.dtype)  # by an index: scatter_ would go by a float32 copy of all logits
        logits[of_targets] = torch.where(absent, logits[of_targets], new)
    return losses, logits, (pull / total)[:, None]


def _chunk_on_gpu(
    x: Tensor, head: Tensor, targets: Tensor, pull: Tensor, axis: Axis, first: int, needs_grad: bool, z_loss: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same by kernels that make the gradient where the logits are, scaled already."""
    from megatrain.parallel import softmax_kernel  # Triton comes with torch for GPUs only

    logits = x @ head.T
    if axis.size == 1 and needs_grad and not z_loss:
        found = softmax_kernel.statistics_and_gradient_(logits, targets, pull)
    else:
        found = _merged(softmax_kernel.statistics(logits, targets, first), axis)
        if needs_grad and z_loss:
            # w (softmax - onehot) + 2 z log w softmax = w (1 + 2 z log) (softmax - onehot) + 2 z log w onehot
            more = 2 * z_loss * (found[1].log() + found[0]) * pull
            softmax_kernel.gradient_(logits, targets, pull + more, found, first)
            absent = (targets < first) | (targets >= first + head.shape[0])
            local = (targets - first).masked_fill(absent, 0)[:, None]
            logits.scatter_add_(-1, local, more.masked_fill(absent, 0.0)[:, None].to(logits.dtype))
        elif needs_grad:
            softmax_kernel.gradient_(logits, targets, pull, found, first)
    top, total, hit = found.unbind()
    return total.log() + top - hit, logits, None


def _merged(found: Tensor, axis: Axis) -> Tensor:
    """Statistics [3, n] of some columns -> of all ranks' columns."""
    if axis.size == 1:
        return found
    top, total, hit = found.unbind()
    highest = _over_ranks(top, axis, "max")
    sums = _over_ranks(torch.stack([total * (top - highest).exp(), hit]), axis, "sum")
    return torch.cat([highest[None], sums])


def _over_ranks(x: Tensor, axis: Axis, operation: str) -> Tensor:
    return x if axis.size == 1 else all_reduce(x, axis.group, operation)
