"""Weights that are kept in rows over ranks, and gathered in eight bits.

`fully_shard` (torch.distributed.fsdp) gathers a block's weights before it runs. Where a layer rounds its weight by one
scale for all of it, and the ranks have agreed on that scale, each may as well round its own rows before they travel:
one byte an element instead of two or four, and to the last bit what rounding the gathered weight would give.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from megatrain.nn.precision.recipe import WEIGHT, OneScale, Rounded
from megatrain.parallel import collectives
from megatrain.parallel.mesh import Axis

aten = torch.ops.aten
STILL_A_WEIGHT = {
    aten.alias.default, aten.as_strided.default, aten.detach.default, aten.new_zeros.default, aten.slice.Tensor,
    aten.split.Tensor, aten.view.default,
}  # fmt: skip
"""What `fully_shard` does to a parameter until it holds this rank's rows."""


@dataclass(frozen=True)
class Agreed:
    """What the ranks that hold rows of one weight share."""

    recipe: OneScale
    ranks: Axis
    out: torch.dtype
    """The format in which products are asked for, from which eight bits are rounded."""


class ShardedWeight(Tensor):
    """[o, i], and then this rank's rows of it, as `fully_shard` is given it: it asks what is to be gathered."""

    rows: Tensor
    scale: Tensor
    """float32 [], alike on all ranks; `agree` writes it."""
    agreed: Agreed

    @staticmethod
    def __new__(cls, rows: Tensor, scale: Tensor, agreed: Agreed) -> "ShardedWeight":
        made = _wrapper(cls, rows.shape, rows.dtype, rows.device)
        made.rows, made.scale, made.agreed = rows, scale, agreed
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ShardedWeight({self.rows})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        first = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, cls))
        args, kwargs = tree_map_only(cls, lambda x: x.rows, (args, kwargs or {}))
        out = func(*args, **kwargs)
        return (
            tree_map_only(Tensor, lambda x: cls(x, first.scale, first.agreed), out) if func in STILL_A_WEIGHT else out
        )

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: torch.Size, outer_stride: Sequence[int], module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor], None]:
        """This rank's rows as they travel."""
        rounded = self.agreed.recipe.by_scale(self.rows.to(self.agreed.out), WEIGHT, self.scale)
        return (rounded.values.view(torch.uint8),), None

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor], metadata: None, dtype: torch.dtype, *, out: Any = None
    ) -> tuple[Tensor, tuple[Tensor]] | None:
        """The weight of `outputs`; `out` is the one of an earlier pass, which lives in the same memory."""
        if out is not None:
            return None
        return GatheredWeight(outputs[0], self.scale, self.rows, dtype), outputs


class GatheredWeight(Tensor):
    """[o, i] in eight bits, with which a layer multiplies, and to which it gives a gradient in the weight's format."""

    codes: Tensor
    """uint8 [o, i]: the numbers of the eight-bit format."""
    scale: Tensor
    rows: Tensor
    """This rank's, unrounded."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, rows: Tensor, dtype: torch.dtype) -> "GatheredWeight":
        made = _wrapper(cls, codes.shape, dtype, codes.device)
        made.codes, made.scale, made.rows = codes, scale, rows
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"GatheredWeight({tuple(self.shape)}, scale={self.scale})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale", "rows"], self.dtype

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], dtype: Any, size: Any, stride: Any) -> "GatheredWeight":
        return cls(inner["codes"], inner["scale"], inner["rows"], dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        self = args[0]
        if func in (aten.alias.default, aten.as_strided.default, aten.detach.default):  # all of it, as it is
            return cls(self.codes, self.scale, self.rows, self.dtype)
        if func is aten.zeros_like.default:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        raise NotImplementedError(f"{func} of a weight that was gathered in eight bits: ask `exact` for its numbers")


def _wrapper(cls: Any, shape: Any, dtype: torch.dtype, device: torch.device) -> Any:
    return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)


def rounded_weight(weight: Tensor, recipe: Any, axis: Axis, out: torch.dtype) -> Rounded:
    """[o, i] in eight bits."""
    if isinstance(weight, GatheredWeight):
        return Rounded(weight.codes.view(recipe.format(WEIGHT)), weight.scale)
    return recipe.round(weight.to(out), WEIGHT, axis)


def rounded_columns(weight: Tensor, recipe: Any, axis: Axis, out: torch.dtype) -> Rounded:
    """The transpose [i, o] in eight bits."""
    if isinstance(weight, GatheredWeight):  # one scale is that of the columns too
        return Rounded(weight.codes.view(recipe.format(WEIGHT)).T, weight.scale)
    return recipe.round(weight.to(out).T, WEIGHT, axis)


def exact(weight: Tensor, ranks: Axis) -> Tensor:
    """A layer's weight in the format in which it is gathered else; where it came in eight bits it is collected anew."""
    return _Exact.apply(weight, ranks) if isinstance(weight, GatheredWeight) else weight


class _Exact(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: GatheredWeight, ranks: Axis) -> Tensor:
        mine = weight.rows.to(weight.dtype)
        return collectives.all_gather(mine, ranks.group, 0) if ranks.size > 1 else mine.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


@torch.no_grad()
def agree(weights: Iterable[ShardedWeight], row: Axis) -> None:
    """Bring the scales up to date with the weights: one small collective, and one over the ranks of `row`."""
    weights = list(weights)
    if not weights:
        return
    first = weights[0].agreed
    amax = torch.stack([w.rows.abs().amax() for w in weights])
    amax = amax.to(first.out).float()
    for axis in (first.ranks, row):
        if axis.size > 1:
            amax = collectives.all_reduce(amax, axis.group, "max")
    for w, largest in zip(weights, amax.unbind(), strict=True):
        w.scale.copy_(w.agreed.recipe.scale(largest, WEIGHT))
