"""INT8 products with a scale for each row, output gradients rounded stochastically."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatrain.nn.hashing import mix
from megatrain.nn.precision.recipe import GRADIENT, Rounded
from megatrain.nn.precision.select import Selection
from megatrain.parallel.mesh import Axis

END = 127


@dataclass(frozen=True, kw_only=True)
class Int8(Selection):
    """Linear layers in INT8: the run file's `precision.int8`. Products are summed exactly, in int32.

    Paper: Jetfire (Xi et al. 2024, arXiv:2403.12422) and SwitchBack (Wortsman et al. 2023, arXiv:2304.13013), with
    scales for rows of what a rank holds.
    """

    weight_gradient: Literal["low", "high"] = "high"
    """high leaves the products that make weight gradients in the format of the run, as SwitchBack does."""
    stochastic_rounding: bool = True
    """Round output gradients up or down by chance, so that their mean is exact. The chance is a hash of the element's
    column and of its row's scale: no state, other bits in every step, and the same whichever rows come together."""

    @property
    def one_scale(self) -> bool:
        return False

    def card_problem(self, capability: tuple[int, int] | None) -> str:
        """Why a card of this compute capability cannot do it; empty where it can, and on a CPU, which emulates it."""
        if capability is None or capability >= (7, 5):
            return ""
        return (
            f"precision.int8 needs a card with INT8 units (compute capability 7.5 or newer) and this one has "
            f"{capability[0]}.{capability[1]}: leave precision.int8 out"
        )

    def round(self, x: Tensor, what: str, axis: Axis) -> Rounded:
        x = x.float()
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / END
        scaled = x / scale
        if what == GRADIENT and self.stochastic_rounding:
            scaled = torch.floor(scaled + uniform(scale, x.shape[-1]))
        return Rounded(scaled.round().clamp(-END, END).to(torch.int8), scale)

    def multiply(self, a: Rounded, b: Rounded, out: torch.dtype) -> Tensor:
        if a.values.device.type == "cuda":
            total = torch._int_mm(a.values.contiguous(), b.values.contiguous().T).float()
        else:
            total = a.values.float() @ b.values.float().T  # exact below 2^24, and rounded as float32 sums are above
        return (total * (a.scale * b.scale_row)).to(out)

    def lost(self, x: Tensor, rounded: Rounded) -> Tensor:
        ends, zeros = rounded.values.abs() >= END, (rounded.values == 0) & (x != 0)
        return torch.stack([ends.sum(), zeros.sum()]).float()

    @classmethod
    def examples(cls) -> list["Int8"]:
        return [cls(), cls(weight_gradient="low"), cls(stochastic_rounding=False)]


def uniform(scale: Tensor, width: int) -> Tensor:
    """float32 [n, width] in [0, 1): a hash of (row's scale [n, 1], column)."""
    column = torch.arange(width, device=scale.device)
    return (mix(mix(scale.view(torch.int32).long()) ^ column) & 0xFFFFFF).float() / 2**24
