"""What is called of NVIDIA's Transformer Engine, written out in plain torch: it needs a GPU and a build of its own.

Names, arguments and what is refused are those of its releases 2.9 to 2.20. The numbers are FP8's: a scale for each
operand of each of the three products.
"""

import contextlib
import enum
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatrain.base.optional import optional


class Format(enum.Enum):
    E4M3 = (torch.float8_e4m3fn, torch.float8_e4m3fn)
    HYBRID = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass
class Float8CurrentScaling:
    fp8_format: Format = Format.HYBRID


@dataclass
class MXFP8BlockScaling:
    fp8_format: Format = Format.E4M3


_active: list[Any] = []
calls: list[Any] = []
"""The recipe of every product that was made."""


@contextlib.contextmanager
def autocast(
    enabled: bool = True, calibrating: bool = False, recipe: Any = None, amax_reduction_group: Any = None
) -> Iterator[None]:
    _active.append(recipe if enabled else None)
    yield
    _active.pop()


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What is left of [n, k] in FP8 with one scale, as float32."""
    scale = torch.finfo(dtype).max / x.float().abs().amax().clamp(min=1e-12)
    return (x.float() * scale).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype).float() / scale


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, formats: tuple[torch.dtype, torch.dtype]) -> Tensor:
        ctx.formats, ctx.dtypes = formats, (x.dtype, weight.dtype)
        x, weight = rounded(x, formats[0]), rounded(weight, formats[0])
        ctx.save_for_backward(x, weight)
        return (x @ weight.T).to(ctx.dtypes[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        g = rounded(grads[0], ctx.formats[1])
        return (g @ weight).to(ctx.dtypes[0]), (g.T @ x).to(ctx.dtypes[1]), None


class Linear(nn.Module):
    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, params_dtype: Any = None, device: Any = "cuda"
    ) -> None:
        super().__init__()
        assert not bias
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))

    def forward(self, inp: Tensor) -> Tensor:
        recipe = _active[-1]
        rows = inp.reshape(-1, inp.shape[-1])
        assert rows.shape[0] % 8 == 0 == rows.shape[1] % 16, "FP8 execution requires such sizes"
        if not torch.is_autocast_enabled("cpu"):
            assert self.weight.dtype == inp.dtype, "Data types for parameters must match when outside of autocast"
        calls.append(recipe)
        return _Product.apply(rows, self.weight, recipe.fp8_format.value).view(*inp.shape[:-1], -1)


@contextlib.contextmanager
def installed() -> Iterator[list[Any]]:
    """With this as `transformer_engine`; the recipes of its products."""
    package, pytorch, common, recipe = (
        types.ModuleType(f"transformer_engine{name}") for name in ("", ".pytorch", ".common", ".common.recipe")
    )
    pytorch.Linear, pytorch.autocast = Linear, autocast  # type: ignore[attr-defined]
    for kind in (Format, Float8CurrentScaling, MXFP8BlockScaling):
        setattr(recipe, kind.__name__, kind)
    optional.cache_clear()
    calls.clear()
    with pytest.MonkeyPatch.context() as patch:
        for module in (package, pytorch, common, recipe):
            patch.setitem(sys.modules, module.__name__, module)
        yield calls
    optional.cache_clear()
