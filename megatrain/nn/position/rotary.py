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

    def rotate(self, x: Tensor, tables: tuple[Tensor, Tensor], n_turned: int | None = None) -> Tensor:
        """Heads [b, t, heads, head_dim] with the first `n_turned` of them turned (all by default)."""
        n = x.shape[2] if n_turned is None else n_turned
        if torch.compiler.is_compiling():  # the compiler fuses the plain form, and finds that it need not keep x
            return _plainly_turned(x, *tables, n)
        return _Turn.apply(x, *tables, n)

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


def _plainly_turned(x: Tensor, cos: Tensor, sin: Tensor, n: int) -> Tensor:
    real, imaginary = x[:, :, :n].chunk(2, -1)
    turned = torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], -1).to(x.dtype)
    return turned if n == x.shape[2] else torch.cat([turned, x[:, :, n:]], 2)


class _Turn(torch.autograd.Function):
    """A rotation; its gradient is the rotation back, so that only the small tables are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.n = n
        b, t, heads, width = x.shape
        by_head = x.new_empty(b, heads, t, width)  # as attention reads it
        return _turn(x, cos, sin, n, by_head.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, -sin, ctx.n, grads[0].new_empty(grads[0].shape)), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, n: int, into: Tensor) -> Tensor:
    """Write the first `n` heads turned, and the others as they are, into `into`; sums are float32 at least."""
    given, target = x[:, :, :n], into[:, :, :n]
    turned = target if torch.result_type(x, cos) == x.dtype else torch.empty_like(given, dtype=cos.dtype)
    torch.mul(given, torch.cat([cos, cos], -1), out=turned)
    (real, imaginary), (left, right) = given.chunk(2, -1), turned.chunk(2, -1)
    left.addcmul_(imaginary, sin, value=-1)
    right.addcmul_(real, sin)
    if turned is not target:
        target.copy_(turned)
    if n < x.shape[2]:
        into[:, :, n:].copy_(x[:, :, n:])
    return into
