"""Loss and gradient of rows of logits in one go, on a GPU: a Triton kernel beside the plain form in `cross_entropy`.

Plain torch would write the logits in float32 and go over them six times, 38 bytes of traffic a logit. Here each row is
read twice, the second time mostly from the cache, and its gradient takes the place of the logits: 4 to 6 bytes. The
sum of exponentials is kept on the way to the largest logit (Milakov and Gimelshein 2018, arXiv:1805.02867).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 8

LOWEST: tl.constexpr = tl.constexpr(-1e30)
"""Below any logit, and finite, so that the difference of two of them is a number."""


@triton.jit
def _statistics_of_row(row, n_columns, block: tl.constexpr):
    """(largest logit, sum of exp(logit - largest)), each lane first for itself."""
    tops = tl.full((block,), LOWEST, tl.float32)
    totals = tl.zeros((block,), tl.float32)
    for begin in range(0, n_columns, block):
        columns = begin + tl.arange(0, block)
        x = tl.load(row + columns, mask=columns < n_columns, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(tops, x)
        totals = totals * tl.exp(tops - higher) + tl.exp(x - higher)
        tops = higher
    top = tl.max(tops, 0)
    return top, tl.sum(totals * tl.exp(tops - top), 0)


@triton.jit
def _write_statistics(row, target, statistics, n_rows, n_columns, block: tl.constexpr):
    """Write a row's largest logit, sum of exponentials and target's logit, `n_rows` apart; return the first two."""
    here = (target >= 0) & (target < n_columns)
    hit = tl.load(row + target, mask=here, other=0.0).to(tl.float32)
    top, total = _statistics_of_row(row, n_columns, block)
    tl.store(statistics, top)
    tl.store(statistics + n_rows, total)
    tl.store(statistics + 2 * n_rows, hit)
    return top, total


@triton.jit
def _gradient_of_row(row, n_columns, target, weight, top, total, block: tl.constexpr):
    """weight x (softmax - one-hot), written over the logits."""
    scale = weight / total
    for begin in range(0, n_columns, block):
        columns = begin + tl.arange(0, block)
        here = columns < n_columns
        x = tl.load(row + columns, mask=here, other=0.0).to(tl.float32)
        gradient = tl.exp(x - top) * scale
        gradient = tl.where(columns == target, gradient - weight, gradient)
        tl.store(row + columns, gradient.to(row.dtype.element_ty), mask=here)


@triton.jit
def statistics_kernel(logits, targets, statistics, stride, n_rows, n_columns, first, block: tl.constexpr):
    """Write of each row its largest logit, its sum of exponentials and its target's logit (0 if it is not here)."""
    at = tl.program_id(0)
    row = logits + at.to(tl.int64) * stride
    target = (tl.load(targets + at) - first).to(tl.int32)
    _write_statistics(row, target, statistics + at, n_rows, n_columns, block)


@triton.jit
def gradient_kernel(logits, targets, weights, statistics, stride, n_rows, n_columns, first, block: tl.constexpr):
    """Put the gradient in the place of the logits, from statistics over all columns."""
    at = tl.program_id(0)
    row = logits + at.to(tl.int64) * stride
    target = (tl.load(targets + at) - first).to(tl.int32)
    top, total = tl.load(statistics + at), tl.load(statistics + n_rows + at)
    _gradient_of_row(row, n_columns, target, tl.load(weights + at), top, total, block)


@triton.jit
def both_kernel(logits, targets, weights, statistics, stride, n_rows, n_columns, first, block: tl.constexpr):
    """Both, where all columns are here: the second reading of a row finds most of it in the cache."""
    at = tl.program_id(0)
    row = logits + at.to(tl.int64) * stride
    target = (tl.load(targets + at) - first).to(tl.int32)
    top, total = _write_statistics(row, target, statistics + at, n_rows, n_columns, block)
    _gradient_of_row(row, n_columns, target, tl.load(weights + at), top, total, block)


# ------------------------------------------------------------------------------------------------ from torch


@torch.library.custom_op("megatrain::softmax_statistics", mutates_args=())
def statistics(logits: Tensor, targets: Tensor, first: int) -> Tensor:
    """float32 [3, n]: the largest logit of each row, its sum of exp(logit - largest), its target's logit or 0.

    Args:
        logits: [n, v], rows contiguous.
        targets: int64 [n], in the numbering of the whole vocabulary; this rank's columns begin at `first`.
    """
    return _launch(statistics_kernel, logits, (targets,), first)


@torch.library.custom_op("megatrain::softmax_gradient_", mutates_args=("logits",))
def gradient_(logits: Tensor, targets: Tensor, weights: Tensor, found: Tensor, first: int) -> None:
    """Turn logits [n, v] into weight x (softmax - one-hot).

    Args:
        weights: float32 [n].
        found: float32 [3, n]: what `statistics` gives, over all ranks' columns.
    """
    n, v = logits.shape
    if n and v:
        gradient_kernel[(n,)](
            logits, targets, weights, found, logits.stride(0), n, v, first, block=BLOCK, num_warps=WARPS
        )


@torch.library.custom_op("megatrain::softmax_statistics_and_gradient_", mutates_args=("logits",))
def statistics_and_gradient_(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """`statistics`, and `gradient_` by them, where all columns are here."""
    return _launch(both_kernel, logits, (targets, weights), 0)


@statistics.register_fake
def _(logits: Tensor, targets: Tensor, first: int) -> Tensor:
    return logits.new_empty((3, logits.shape[0]), dtype=torch.float32)


@gradient_.register_fake
def _(logits: Tensor, targets: Tensor, weights: Tensor, found: Tensor, first: int) -> None:
    pass


@statistics_and_gradient_.register_fake
def _(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return logits.new_empty((3, logits.shape[0]), dtype=torch.float32)


def _launch(kernel: Any, logits: Tensor, given: tuple[Tensor, ...], first: int) -> Tensor:
    n, v = logits.shape
    found = torch.empty(3, n, dtype=torch.float32, device=logits.device)
    if n:
        kernel[(n,)](logits, *given, found, logits.stride(0), n, v, first, block=BLOCK, num_warps=WARPS)
    return found
