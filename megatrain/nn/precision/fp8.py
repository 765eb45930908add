"""FP8 products with dynamic scales (Micikevicius et al. 2022, arXiv:2209.05433)."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatrain.nn.precision import mx
from megatrain.nn.precision.quantised import Quantised
from megatrain.nn.precision.recipe import GRADIENT, Rounded
from megatrain.nn.precision.select import Selection
from megatrain.nn.precision.transformer_engine import TransformerEngine, choice_problems, why_not
from megatrain.parallel.collectives import all_reduce
from megatrain.parallel.mesh import Axis

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}

SMALLEST_AMAX = 1e-12
"""A tensor of zeros gets the scale of this one: 0 x scale stays 0."""


@dataclass(frozen=True, kw_only=True)
class Fp8(Selection):
    """Linear layers in FP8: the run file's `precision.fp8`.

    On a GPU that has FP8 units (compute capability 8.9 and up) products are torch's scaled ones; elsewhere the same
    rounded operands are multiplied as float32 numbers.
    """

    kind: Literal["tensorwise", "rowwise", "mx"] = "tensorwise"
    """tensorwise: one scale for an operand, agreed over the ranks that hold its parts; rowwise: one for each row that
    is summed over, of what the rank holds, rounded to a power of 2; mx: one for each 32 numbers of a row (MXFP8)."""
    gradient: Literal["e4m3", "e5m2"] | None = None
    """Format of output gradients; by default e5m2 (more range) tensorwise and e4m3 (more digits) else."""
    weight_gradient: Literal["low", "high"] = "high"
    """high leaves the products that make weight gradients in the format of the run."""
    backend: Literal["torch", "transformer_engine"] = "torch"
    """Whose kernels round and multiply: torch's, or NVIDIA Transformer Engine's where it is installed."""

    @property
    def one_scale(self) -> bool:
        return self.kind == "tensorwise" and self.backend == "torch"

    def problems(self) -> list[str]:
        theirs = [] if self.backend == "torch" else choice_problems(self.kind, self.weight_gradient)
        return super().problems() + theirs

    def product(self, axis: Axis, summed_over: Axis) -> Quantised:
        return (Quantised if self.backend == "torch" else TransformerEngine)(self, axis, summed_over)

    def card_problem(self, capability: tuple[int, int] | None) -> str:
        """Why a card of this compute capability cannot do it; empty where it can, and on a CPU, which emulates it."""
        if self.backend != "torch" and (reason := why_not(capability)):
            return reason
        if capability is None or capability >= ((10, 0) if self.kind == "mx" else (8, 9)):
            return ""
        if capability >= (8, 9):
            return (
                "precision.fp8.kind=mx needs a card that scales blocks of 32 (compute capability 10.0: B200 or newer) "
                f"and this one has {capability[0]}.{capability[1]}: set precision.fp8.kind to rowwise or tensorwise"
            )
        return (
            f"precision.fp8 needs a card with FP8 units (compute capability 8.9: L40S, H100 or newer) and this one has "
            f"{capability[0]}.{capability[1]}: leave precision.fp8 out to train in bf16, or use precision.int8"
        )

    def format(self, what: str) -> torch.dtype:
        if what != GRADIENT:
            return FORMATS["e4m3"]
        return FORMATS[self.gradient or ("e5m2" if self.kind == "tensorwise" else "e4m3")]

    def round(self, x: Tensor, what: str, axis: Axis) -> Rounded:
        dtype = self.format(what)
        if self.kind == "mx":
            x = mx.padded(x)
            inverse = power_of_2(mx.largest(x).clamp(min=SMALLEST_AMAX) / torch.finfo(dtype).max)
            return Rounded(cast(x.float() / mx.spread(inverse), dtype), inverse)
        if self.kind == "tensorwise":
            amax = x.abs().amax() if x.numel() else x.new_zeros(())
            amax = amax.float() if axis.size == 1 else all_reduce(amax.float(), axis.group, "max")
        else:
            amax = x.abs().amax(-1, keepdim=True).float()
        return self.by_scale(x, what, self.scale(amax, what))

    def scale(self, amax: Tensor, what: str) -> Tensor:
        """By which numbers of at most this size become those of the format: of a whole operand, or of its rows."""
        inverse = amax.clamp(min=SMALLEST_AMAX) / torch.finfo(self.format(what)).max
        return power_of_2(inverse) if self.kind == "rowwise" else inverse

    def by_scale(self, x: Tensor, what: str, scale: Tensor) -> Rounded:
        return Rounded(cast(x.float() / scale, self.format(what)), scale)

    def multiply(self, a: Rounded, b: Rounded, out: torch.dtype) -> Tensor:
        if self.kind == "mx":
            product = mx.product if a.values.device.type == "cuda" else mx.emulated_product
            return product(a.values, a.scale, b.values, b.scale, out)
        if a.values.device.type == "cuda":
            return torch._scaled_mm(
                a.values.contiguous(), b.values.contiguous().T, scale_a=a.scale, scale_b=b.scale_row, out_dtype=out
            )
        return ((a.values.float() @ b.values.float().T) * (a.scale * b.scale_row)).to(out)

    def lost(self, x: Tensor, rounded: Rounded) -> Tensor:
        values = rounded.values[:, : x.shape[1]].float()
        ends = values.abs() >= torch.finfo(rounded.values.dtype).max
        return torch.stack([ends.sum(), ((values == 0) & (x != 0)).sum()]).float()

    @classmethod
    def examples(cls) -> list["Fp8"]:
        kinds: list[Any] = ["tensorwise", "rowwise", "mx"]
        return [cls(kind=kind, weight_gradient=how) for kind in kinds for how in ("high", "low")]


def power_of_2(x: Tensor) -> Tensor:
    """The next one that is not smaller."""
    return torch.exp2(torch.ceil(torch.log2(x)))


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 to the nearest number of an FP8 format, ties to even; what is beyond its end becomes its end.

    NaN stays NaN.
    """
    end = torch.finfo(dtype).max
    return x.clamp(-end, end).to(dtype)
