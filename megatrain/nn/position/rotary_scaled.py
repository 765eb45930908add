"""Rotary positions stretched to longer sequences than a model was first trained on.

A pair that turns often within the first length is left as it is (it tells neighbours apart); one that does not come
around once is slowed down by `factor`, so that it sees no angle it was not trained on; in between the two are mixed.
The kinds differ in the mixing:

| kind | mixed in between | paper |
|---|---|---|
| rotary_linear | nothing is spared, all pairs are slowed down | Chen et al. 2023, arXiv:2306.15595 |
| rotary_llama3 | linearly in the number of turns | Grattafiori et al. 2024, arXiv:2407.21783 |
| rotary_yarn | linearly in the index of the pair; scores are sharpened | Peng et al. 2023, arXiv:2309.00071 |
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatrain.nn.position import POSITION
from megatrain.nn.position.rotary import Rotary


@dataclass(frozen=True, kw_only=True)
class Stretched(Rotary):
    """What the kinds have in common."""

    factor: float
    """By which the length is multiplied."""

    def problems(self) -> list[str]:
        found = super().problems()
        if self.factor < 1:
            found.append(f"factor={self.factor}: it must be at least 1")
        return found

    def share_kept(self, rates: Tensor) -> Tensor:
        """How much of its own rate each pair keeps, the rest being slowed down: in [0, 1], as float64 [width / 2].

        Args:
            rates: radians a token, as without stretching.
        """
        return torch.zeros_like(rates)

    def rates(self, head_dim: int, device: torch.device | None = None) -> Tensor:
        rates = super().rates(head_dim, device)
        kept = self.share_kept(rates)
        return kept * rates + (1 - kept) * rates / self.factor

    def wholly_turned(self, x: Tensor, positions: Tensor) -> Tensor:
        """Pair by pair on complex numbers, in float64: x [b, t, heads, width]."""
        half = x.shape[-1] // 2
        turned = torch.empty_like(x, dtype=torch.float64)
        for pair in range(half):
            rate = self.stretched_rate(self.theta ** (-pair / half), pair, 2 * half)
            z = torch.complex(x[..., pair].double(), x[..., pair + half].double())
            z = self.amplitude * z * torch.exp(1j * rate * positions[..., None].double())
            turned[..., pair], turned[..., pair + half] = z.real, z.imag
        return turned

    def stretched_rate(self, rate: float, pair: int, width: int) -> float:
        """The slow twin of `share_kept`: the rate of one pair in radians a token, as the paper defines it."""
        return rate / self.factor


@POSITION.register("rotary_linear")
@dataclass(frozen=True, kw_only=True)
class RotaryLinear(Stretched):
    """Position interpolation: as if positions were divided by the factor."""

    @classmethod
    def examples(cls) -> list[Any]:
        return [cls(factor=1.0), cls(factor=4.0, share=0.5)]


@dataclass(frozen=True, kw_only=True)
class StretchedFrom(Stretched):
    """Kinds that look at how often a pair turns within the first length."""

    original_seq_len: int
    """Tokens of the sequences of the first training."""

    def problems(self) -> list[str]:
        found = super().problems()
        if self.original_seq_len < 1:
            found.append(f"original_seq_len={self.original_seq_len}: it must be at least 1 token")
        return found


@POSITION.register("rotary_llama3")
@dataclass(frozen=True, kw_only=True)
class RotaryLlama3(StretchedFrom):
    """As Llama 3.1 and later do it."""

    few_turns: float = 1.0
    """Pairs that turn less often within the first length are slowed down."""
    many_turns: float = 4.0
    """Pairs that turn more often are left as they are."""

    def problems(self) -> list[str]:
        found = super().problems()
        if not self.few_turns < self.many_turns:
            found.append(f"few_turns={self.few_turns} must be below many_turns={self.many_turns}")
        return found

    def share_kept(self, rates: Tensor) -> Tensor:
        turns = self.original_seq_len * rates / (2 * math.pi)
        return ((turns - self.few_turns) / (self.many_turns - self.few_turns)).clamp(0, 1)

    def stretched_rate(self, rate: float, pair: int, width: int) -> float:
        wavelength = 2 * math.pi / rate
        if wavelength < self.original_seq_len / self.many_turns:
            return rate
        if wavelength > self.original_seq_len / self.few_turns:
            return rate / self.factor
        smooth = (self.original_seq_len / wavelength - self.few_turns) / (self.many_turns - self.few_turns)
        return (1 - smooth) * rate / self.factor + smooth * rate

    @classmethod
    def examples(cls) -> list[Any]:
        return [
            cls(factor=8.0, original_seq_len=16, theta=500_000.0),
            cls(factor=2.0, original_seq_len=4, many_turns=2.0),
        ]


@POSITION.register("rotary_yarn")
@dataclass(frozen=True, kw_only=True)
class RotaryYarn(StretchedFrom):
    """Section 3 of the paper, with pair indices rounded outwards as its authors' code does."""

    few_turns: float = 1.0
    """Beta slow: pairs that turn less often within the first length are slowed down."""
    many_turns: float = 32.0
    """Beta fast: pairs that turn more often are left as they are."""
    attention_factor: float | None = None
    """Queries and keys are multiplied by this; 1 + ln(factor) / 10 by default."""

    def problems(self) -> list[str]:
        found = super().problems()
        if not self.few_turns < self.many_turns:
            found.append(f"few_turns={self.few_turns} must be below many_turns={self.many_turns}")
        return found

    @property
    def amplitude(self) -> float:
        return 1 + math.log(self.factor) / 10 if self.attention_factor is None else self.attention_factor

    def bounds(self, width: int) -> tuple[int, int]:
        """The first pair that is slowed down at all, and the first that is wholly."""
        first, last = self._pair_of(self.many_turns, width), self._pair_of(self.few_turns, width)
        return max(math.floor(first), 0), min(math.ceil(last), width - 1)

    def share_kept(self, rates: Tensor) -> Tensor:
        first, last = self.bounds(2 * len(rates))
        pairs = torch.arange(len(rates), device=rates.device, dtype=torch.float64)
        return 1 - ((pairs - first) / max(last - first, 1e-3)).clamp(0, 1)

    def stretched_rate(self, rate: float, pair: int, width: int) -> float:
        first, last = self.bounds(width)
        if pair <= first:
            return rate
        if pair >= last:
            return rate / self.factor
        slowed = (pair - first) / (last - first)
        return slowed * rate / self.factor + (1 - slowed) * rate

    def _pair_of(self, turns: float, width: int) -> float:
        """The index, a fraction, of the pair that turns this often within the first length."""
        return width * math.log(self.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

    @classmethod
    def examples(cls) -> list[Any]:
        return [
            cls(factor=4.0, original_seq_len=64, many_turns=8.0),
            cls(factor=2.0, original_seq_len=4096, theta=100.0, attention_factor=1.5),
        ]
