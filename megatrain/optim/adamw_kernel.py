"""A step of AdamW for many tensors in one launch, on a GPU: a Triton kernel.

torch's fused step writes the divided gradients back, and the model's bf16 weights are then made of the float32 masters
by a copy of its own: 38 bytes of traffic a weight, in a launch for every 20 million of them and list. Here each number
crosses the memory once, 30 bytes a weight, and a program finds the tensor that it works on in a table of addresses.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE, BLOCK, WARPS = 8192, 2048, 8
"""Elements of one program, of one turn of it, and its warps: a thread holds 8 numbers of each tensor."""

FORMATS = (torch.float32,) * 4 + (torch.bfloat16,)
"""Of a master, its gradient, average, square and copy; there may be no copy."""

LOG2_OF_NOTHING = -2000.0
"""Of a beta of 0, whose powers are 0 in float64 too."""


@triton.jit
def _tensor(address, aligned: tl.constexpr, dtype: tl.constexpr):
    pointer = address.to(tl.pointer_type(dtype))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _correction(log2_beta: tl.constexpr, count):
    """1 - beta^count, by way of float64: in the first steps it is close to 0."""
    return (1.0 - tl.exp2(count.to(tl.float64) * log2_beta)).to(tl.float32)


@triton.jit
def step_kernel(
    table, count, divisor, found_inf, lr, decay,
    beta1: tl.constexpr, beta2: tl.constexpr, log2_beta1: tl.constexpr, log2_beta2: tl.constexpr, eps: tl.constexpr,
    n: tl.constexpr, copying: tl.constexpr, aligned: tl.constexpr, tile: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """`tile` elements of one of the tensors in the columns of `table` (see `_table`)."""
    at = tl.program_id(0)
    first_tiles = tl.load(table + 6 * n + tl.arange(0, n))
    column = table + tl.sum((first_tiles <= at).to(tl.int32), 0) - 1
    begin = (at - tl.load(column + 6 * n)) * tile
    stop = tl.minimum(begin + tile, tl.load(column + 5 * n))
    stop = tl.where(tl.load(found_inf) > 0.0, begin, stop)  # nothing
    if aligned:
        stop = tl.multiple_of(stop, 16)
    master = _tensor(tl.load(column), aligned, tl.float32)
    gradient = _tensor(tl.load(column + n), aligned, tl.float32)
    average = _tensor(tl.load(column + 2 * n), aligned, tl.float32)
    square = _tensor(tl.load(column + 3 * n), aligned, tl.float32)

    t = tl.load(count)
    rate = lr / _correction(log2_beta1, t)
    root = tl.sqrt(_correction(log2_beta2, t))
    by = tl.load(divisor)
    for ahead in range(0, tile, block):
        i = begin + ahead + tl.arange(0, block)
        here = i < stop
        g = tl.load(gradient + i, mask=here, other=0.0) / by
        m = tl.load(average + i, mask=here, other=0.0)
        v = tl.load(square + i, mask=here, other=0.0)
        w = tl.load(master + i, mask=here, other=0.0)
        m = beta1 * m + (1.0 - beta1) * g
        v = beta2 * v + (1.0 - beta2) * g * g
        w -= decay * w
        w -= rate * m / (tl.sqrt(v) / root + eps)
        tl.store(average + i, m, mask=here)
        tl.store(square + i, v, mask=here)
        tl.store(master + i, w, mask=here)
        if copying:
            copy = _tensor(tl.load(column + 4 * n), aligned, tl.bfloat16)
            tl.store(copy + i, w.to(tl.bfloat16), mask=here)


@torch.library.custom_op("megatrain::adamw_", mutates_args=("tensors", "averages", "squares", "out_copies"))
def step(
    tensors: Sequence[Tensor],
    gradients: Sequence[Tensor],
    averages: Sequence[Tensor],
    squares: Sequence[Tensor],
    out_copies: Sequence[Tensor],
    count: Tensor,
    divisor: Tensor,
    found_inf: Tensor,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One step of AdamW, in place; nothing changes where `found_inf` is 1.

    Args:
        tensors, averages, squares: float32, contiguous.
        gradients: float32, of the same shapes.
        out_copies: bf16, contiguous, to take the values of `tensors`; or none at all.
        count: float32 scalar, the number of this step, from 1.
        divisor: float32 scalar that gradients are divided by.
        found_inf: float32 scalar, 0 or 1.
    """
    gradients = [g.contiguous() for g in gradients]
    table, n_tiles = _table([tensors, gradients, averages, squares, *([out_copies] if out_copies else [])])
    if n_tiles:
        log2 = [math.log2(beta) if beta else LOG2_OF_NOTHING for beta in (beta1, beta2)]
        step_kernel[(n_tiles,)](
            table.to(count.device, non_blocking=True), count, divisor, found_inf, lr, lr * weight_decay,
            beta1, beta2, *log2, eps, n=table.shape[1], copying=bool(out_copies),
            aligned=not table[:6].remainder(16).any().item(), tile=TILE, block=BLOCK, num_warps=WARPS,
        )  # fmt: skip


def _table(lists: Sequence[Sequence[Tensor]]) -> tuple[Tensor, int]:
    """int64 [7, n] on the host, and how many tiles there are.

    Rows: five addresses in the order of `FORMATS`, the number of elements, the first tile. n is a power of 2: columns
    that no tile belongs to fill it up.
    """
    columns, tiles = [], 0
    for tensors in zip(*lists, strict=True):
        numel = tensors[0].numel()
        if numel:
            addresses = [_address(t, dtype, numel) for t, dtype in zip(tensors, FORMATS, strict=False)]
            columns.append([*addresses, *[0] * (len(FORMATS) - len(addresses)), numel, tiles])
            tiles += -(-numel // TILE)
    n = triton.next_power_of_2(max(1, len(columns)))
    columns += [[0] * 6 + [tiles]] * (n - len(columns))
    table = torch.tensor(columns, dtype=torch.int64).T.contiguous()
    return (table.pin_memory() if lists[0][0].is_cuda else table), tiles


def _address(x: Tensor, dtype: torch.dtype, numel: int) -> int:
    """Of what the kernel takes for `numel` numbers in a row; anything else would give wrong ones in silence."""
    if x.dtype != dtype or x.numel() != numel or not x.is_contiguous():
        raise ValueError(
            f"AdamW's kernel got {x.dtype} {list(x.shape)} with strides {x.stride()} where it takes {numel} numbers of "
            f"{dtype} without gaps: make the tensor contiguous and of that format"
        )
    return x.data_ptr()
