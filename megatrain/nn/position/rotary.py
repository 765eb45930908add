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
    share: float = 1.0
    """Share of each head's channels that turn, the first ones (Black et al. 2022, arXiv:2204.06745, section 2.1)."""

    def problems(self) -> list[str]:
        found = [] if self.theta > 1 else [f"theta={self.theta}: it must be above 1"]
        if not 0 < self.share <= 1:
            found.append(f"share={self.share}: it is a share of each head, above 0 and at most 1")
        return found

    def width(self, head_dim: int) -> int:
        """Channels of a head that turn."""
        return int(head_dim * self.share)

    @property
    def amplitude(self) -> float:
        """What turns is multiplied by this."""
        return 1.0

    def rates(self, head_dim: int, device: torch.device | None = None) -> Tensor:
        """Radians a token by which each pair turns, float64 [width / 2]."""
        width = self.width(head_dim)
        return self.theta ** -(torch.arange(0, width, 2, device=device, dtype=torch.float64) / width)

    def unsupported_reasons(self, head_dim: int) -> list[str]:
        if self.share == 1 and head_dim % 2:
            return [f"rotary positions turn pairs, and head_dim={head_dim} is odd"]
        if (width := self.width(head_dim)) % 2 or not width:
            return [f"rotary positions turn pairs, and share={self.share} of head_dim={head_dim} is {width} channels"]
        return []

    def build(self, d_model: int, seq_len: int, tp: TensorParallel) -> None:
        """Nothing is added to the embedded tokens."""

    def prepare(self, positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
        """What each channel and what its pair's other one is multiplied by, each float32 [b, t, 1, width].

        Angles are float64: at a million tokens float32 knows them to a few hundredths of a radian only.
        """
        angles = positions[..., None, None] * self.rates(head_dim, positions.device)
        cos, sin = (angles.cos() * self.amplitude).float(), (angles.sin() * self.amplitude).float()
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

    def rotate(self, x: Tensor, tables: tuple[Tensor, Tensor], n_turned: int | None = None) -> Tensor:
        """Heads [b, t, heads, head_dim] with the first `n_turned` of them turned (all by default)."""
        n = x.shape[2] if n_turned is None else n_turned
        if torch.compiler.is_compiling():  # the compiler fuses the plain form, and finds that it need not keep x
            return _plainly_turned(x, *tables, n)
        return _Turn.apply(x, *tables, n)

    def reference(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [b, t, heads, head_dim] in float64: some channels turned, the others as they are."""
        width = self.width(x.shape[-1])
        return torch.cat([self.wholly_turned(x[..., :width], positions), x[..., width:].double()], -1)

    def wholly_turned(self, x: Tensor, positions: Tensor) -> Tensor:
        """The paper's equation 34 on complex numbers, in float64: x [b, t, heads, width]."""
        half = x.shape[-1] // 2
        pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
        rates = self.theta ** -(torch.arange(half, dtype=torch.float64) / half)
        turned = pairs * torch.exp(1j * positions[..., None, None].double() * rates)
        return torch.cat([turned.real, turned.imag], -1)

    @classmethod
    def examples(cls) -> list["Rotary"]:
        return [cls(), cls(theta=500_000.0), cls(share=0.5)]


def _plainly_turned(x: Tensor, own: Tensor, other: Tensor, n: int) -> Tensor:
    """One formula over every element, which a compiler makes one kernel of, in backward too.

    A channel finds its pair's other one in the other half by a change of index; halves that are put together would be
    written out first.
    """
    width = own.shape[-1]
    if width < x.shape[-1]:
        return torch.cat([_plainly_turned(x[..., :width], own, other, n), x[..., width:]], -1)
    others = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    turned = (x * own + others * other).to(x.dtype)
    if n == x.shape[2]:
        return turned
    return torch.where(torch.arange(x.shape[2], device=x.device)[:, None] < n, turned, x)


class _Turn(torch.autograd.Function):
    """A rotation; its gradient is the rotation back, so that only the small tables are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, own: Tensor, other: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(own, other)
        ctx.n = n
        b, t, heads, width = x.shape
        by_head = x.new_empty(b, heads, t, width)  # as attention reads it
        return _turn(x, own, other, n, by_head.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        own, other = ctx.saved_tensors
        return _turn(grads[0], own, -other, ctx.n, grads[0].new_empty(grads[0].shape)), None, None, None


def _turn(x: Tensor, own: Tensor, other: Tensor, n: int, into: Tensor) -> Tensor:
    """Write the first `n` heads turned, and the others as they are, into `into`; sums are float32 at least."""
    width = own.shape[-1]
    given, target = x[:, :, :n, :width], into[:, :, :n, :width]
    turned = target if torch.result_type(x, own) == x.dtype else torch.empty_like(given, dtype=own.dtype)
    torch.mul(given, own, out=turned)
    (real, imaginary), (left, right) = given.chunk(2, -1), turned.chunk(2, -1)
    for_left, for_right = other.chunk(2, -1)
    left.addcmul_(imaginary, for_left)
    right.addcmul_(real, for_right)
    if turned is not target:
        target.copy_(turned)
    if width < x.shape[3]:
        into[:, :, :n, width:].copy_(x[:, :, :n, width:])
    if n < x.shape[2]:
        into[:, :, n:].copy_(x[:, :, n:])
    return into
