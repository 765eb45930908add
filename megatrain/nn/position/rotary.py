"""Rotary positions (Su et al. 2021, arXiv:2104.09864): queries and keys turn by an angle that grows with position.

The pairs that turn together are the two halves of a head (k and k + head_dim/2), as in Llama's published weights in
the transformers library; the paper pairs neighbours, which is a fixed permutation of the same thing.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatrain.nn.position import POSITION
from megatrain.parallel.tensor import TensorParallel


@POSITION.register("rotary")
@dataclass(frozen=True, kw_only=True)
class Rotary:
    theta: float = 10_000.0
    """Base of the geometric series of wavelengths."""

    def problems(self) -> list[str]:
        return [] if self.theta > 1 else [f"theta={self.theta}: it must be above 1"]

    def unsupported_reasons(self, head_dim: int) -> list[str]:
        return [f"rotary positions turn pairs, and head_dim={head_dim} is odd"] if head_dim % 2 else []

    def build(self, d_model: int, seq_len: int, tp: TensorParallel) -> None:
        """Nothing is added to the embedded tokens."""

    def prepare(self, positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each float32 [b, t, 1, head_dim/2].

        Angles are float64: at a million tokens float32 knows them to a few hundredths of a radian only.
        """
        exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim
        angles = positions[..., None, None] * self.theta**-exponents
        return angles.cos().float(), angles.sin().float()

    def rotate(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """Queries or keys [b, t, heads, head_dim], turned."""
        if torch.compiler.is_compiling():  # the compiler fuses the plain form, and finds that it need not keep x
            return _turned(x, *tables, 1)
        return _Turn.apply(x, *tables)

    def reference(self, x: Tensor, positions: Tensor) -> Tensor:
        """The paper's equation 34 on complex numbers, in float64: x [b, t, heads, head_dim]."""
        half = x.shape[-1] // 2
        pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
        rates = self.theta ** -(torch.arange(half, dtype=torch.float64) / half)
        turned = pairs * torch.exp(1j * positions[..., None, None].double() * rates)
        return torch.cat([turned.real, turned.imag], -1)

    @classmethod
    def examples(cls) -> list["Rotary"]:
        return [cls(), cls(theta=500_000.0)]


class _Turn(torch.autograd.Function):
    """A rotation; its gradient is the rotation back, so that only the small tables are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    real, imaginary = x.chunk(2, -1)
    turned = [
        torch.addcmul(real * cos, imaginary, sin, value=-direction),
        torch.addcmul(imaginary * cos, real, sin, value=direction),
    ]
    return torch.cat(turned, -1).to(x.dtype)
