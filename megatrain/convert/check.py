"""The proof of a conversion: both sides' logits on the same tokens."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatrain.base.errors import CheckpointError
from megatrain.base.random import generator
from megatrain.checkpoint.model import build_model, config_of
from megatrain.checkpoint.read import Commit
from megatrain.checkpoint.tokenizer import valid_tokens
from megatrain.nn.where import Where

TOLERANCE = 1e-5
"""Largest difference of two logits, over the largest logit if that is above 1: float32's own over a deep model."""

PROMPT = (2, 64)
"""Rows and tokens of the prompts."""


class OtherSide(Protocol):
    """Another project's model."""

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens [rows, tokens] -> float32 [rows, tokens, v]."""
        ...


@dataclass(frozen=True)
class Report:
    """What was compared, and how far apart the two sides are."""

    family: str
    source: str
    target: str
    tokens: int
    largest_difference: float | None
    largest_logit: float | None
    tolerance: float
    not_checked: str = ""
    """Why the logits were not compared."""

    @property
    def passed(self) -> bool:
        if self.largest_difference is None or self.largest_logit is None:
            return False
        return self.largest_difference <= self.tolerance * max(1.0, self.largest_logit)


def prompts(vocab_size: int, seq_len: int) -> Tensor:
    """Token ids [rows, tokens], the same for every model of this vocabulary."""
    shape = (PROMPT[0], min(PROMPT[1], seq_len))
    return torch.randint(vocab_size, shape, generator=generator(0, "conversion check", vocab_size))


def logits(model: Any, tokens: Tensor) -> Tensor:
    """Our float32 logits [rows, tokens, v]."""
    rows, length = tokens.shape
    positions = torch.arange(length).expand(rows, -1)
    return model.logits(tokens, Where(positions, torch.zeros_like(positions, dtype=torch.int32)))


@dataclass(frozen=True)
class Proof:
    """Our checkpoint against the same model as the other project computes it, both in float32."""

    commit: Commit
    theirs: OtherSide
    family: str
    source: str
    target: str
    dtype: torch.dtype | None = None
    """What weights were rounded to on the way; ours are rounded alike. None: they were kept."""

    @torch.no_grad()
    def report(self) -> Report:
        """
        Raises:
            CheckpointError: the other side cannot be computed here.
        """
        ours = build_model(self.commit, n_valid=valid_tokens(self.commit), dtype=self.dtype or torch.float32).float()
        tokens = prompts(ours.n_valid, config_of(self.commit)["data"]["seq_len"])
        a = logits(ours, tokens)
        del ours
        b = self.theirs.logits(tokens)
        if a.shape != b.shape:
            raise CheckpointError(f"one side has logits of {a.shape[-1]} tokens, the other of {b.shape[-1]}")
        largest, size = float((a - b).abs().max()), float(b.abs().max())
        return Report(self.family, self.source, self.target, tokens.numel(), largest, size, TOLERANCE)

    def left_out(self, why: str) -> Report:
        return Report(self.family, self.source, self.target, 0, None, None, TOLERANCE, not_checked=why)
