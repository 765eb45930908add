"""How the next token is chosen from logits: greedily, or drawn after temperature, top-k and top-p."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Choosing:
    """The distribution that tokens are drawn from: temperature first, then top-k, then top-p of what is left."""

    temperature: float = 1.0
    """Logits are divided by it: below 1 the likely gets likelier; 0 takes the most probable token, always."""
    top_k: int | None = None
    """Only this many of the most probable tokens are drawn from (Fan et al. 2018, arXiv:1805.04833, section 5.1)."""
    top_p: float = 1.0
    """Only the fewest tokens whose probability reaches this share are drawn from (Holtzman et al. 2019)."""

    def problems(self) -> list[str]:
        found = []
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            found.append(
                f"temperature={self.temperature}: it is 0 (the most probable token) or above; 1 changes nothing"
            )
        if self.top_k is not None and self.top_k < 1:
            found.append(f"top_k={self.top_k}: it counts tokens to draw from, so 1 or more; leave it out to allow all")
        if not 0 < self.top_p <= 1:
            found.append(f"top_p={self.top_p}: it is a share of probability above 0 and up to 1, which allows all")
        return found

    def probabilities(self, logits: Tensor) -> Tensor:
        """What tokens are drawn with: logits [..., v] -> float64 [..., v], zero for what is left out."""
        logits = logits.double()
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        logits = (
            logits - logits.amax(-1, keepdim=True)
        ) / self.temperature  # shifted, so that a tiny one is no inf/inf
        if self.top_k is not None:
            logits = logits.masked_fill(~top_k(logits, self.top_k), -torch.inf)
        if self.top_p < 1:
            logits = logits.masked_fill(~top_p(logits, self.top_p), -torch.inf)
        return logits.softmax(-1)

    def choose(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """The next token of each row.

        Args:
            logits: [b, v].
            uniform: float64 [b] in [0, 1), which alone decides what is drawn.

        Returns:
            int64 [b]; -1 where the logits are not finite numbers, so that nothing has to wait for a check of its own.
        """
        chosen = logits.argmax(-1) if self.temperature == 0 else draw(self.probabilities(logits), uniform)
        return chosen.where(logits.isfinite().all(-1), -1)

    def reference(self, logits: Sequence[float]) -> list[float]:
        """`probabilities` of one row, a token at a time."""
        by_rank = sorted(range(len(logits)), key=lambda i: -logits[i])  # stable: of equals the lower id is first
        if self.temperature == 0:
            return [float(i == by_rank[0]) for i in range(len(logits))]
        best = logits[by_rank[0]]
        weights = {i: math.exp((logits[i] - best) / self.temperature) for i in by_rank[: self.top_k]}
        total, mass, kept = sum(weights.values()), 0.0, {}
        for i, weight in weights.items():
            if mass >= self.top_p * total:
                break
            kept[i] = weight
            mass += weight
        return [kept.get(i, 0.0) / mass for i in range(len(logits))]


def top_k(logits: Tensor, k: int) -> Tensor:
    """The k largest of each row, [..., v] -> bool [..., v]. Of equal ones the lower id counts as larger."""
    order = logits.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order[..., :k], True)


def top_p(logits: Tensor, p: float) -> Tensor:
    """The smallest set of most probable tokens whose mass is at least p, [..., v] -> bool [..., v].

    Paper: Holtzman et al. 2019, arXiv:1904.09751, equation 3. Differs in nothing.
    """
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ranked.softmax(-1)
    mass_before = probabilities.cumsum(-1) - probabilities
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order, mass_before < p)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The token in whose share of [0, 1) `uniform` falls, never one of probability 0: [b, v], [b] -> int64 [b]."""
    ends = probabilities.cumsum(-1)
    at = uniform[:, None] * ends[:, -1:]  # below the end even when rounded: no float64 lies between 1 - 2**-53 and 1
    return torch.searchsorted(ends, at, right=True).squeeze(-1)
