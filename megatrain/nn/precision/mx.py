"""Microscaling: 32 numbers that are summed over share a power of 2 (Rouhani et al. 2023, arXiv:2310.10537)."""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32
"""Numbers that share a scale."""
TILE_ROWS, TILE_COLUMNS = 128, 4
"""Scales that stand together in the order in which tensor cores read them."""


def padded(x: Tensor) -> Tensor:
    """[n, k] with zeros up to a whole number of blocks, which add nothing to a product."""
    return F.pad(x, (0, -x.shape[1] % BLOCK))


def largest(x: Tensor) -> Tensor:
    """The largest size in each block of [n, k]: float32 [n, k / 32]."""
    return x.unflatten(1, (-1, BLOCK)).abs().amax(-1).float()


def spread(scale: Tensor) -> Tensor:
    """[n, k / 32] -> [n, k]."""
    return scale.repeat_interleave(BLOCK, 1)


def emulated_product(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, out: torch.dtype) -> Tensor:
    """a b^T of scaled numbers, summed in float32: each number times its scale is one of float32 exactly."""
    return ((a.float() * spread(scale_a)) @ (b.float() * spread(scale_b)).T).to(out)


def product(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, out: torch.dtype) -> Tensor:
    """The same by tensor cores that know such scales (compute capability 10.0 and up)."""
    blocks, order = F.ScalingType.BlockWise1x32, F.SwizzleType.SWIZZLE_32_4_4
    return F.scaled_mm(
        a.contiguous(), b.contiguous().T, in_tiles(scale_a), blocks, in_tiles(scale_b), blocks,
        swizzle_a=order, swizzle_b=order, output_dtype=out,
    )  # fmt: skip


def in_tiles(scale: Tensor) -> Tensor:
    """Scales [n, k / 32] in the order of the tensor cores: e8m0 [a multiple of 512].

    In a tile of 128 x 4 the one of row r and column c stands at 16 (r mod 32) + 4 (r div 32) + c; tiles follow each
    other along rows.
    """
    rows, columns = scale.shape
    whole = F.pad(scale, (0, -columns % TILE_COLUMNS, 0, -rows % TILE_ROWS), value=1.0)
    tiles = whole.view(whole.shape[0] // TILE_ROWS, 4, 32, whole.shape[1] // TILE_COLUMNS, TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).flatten().to(torch.float8_e8m0fnu)
