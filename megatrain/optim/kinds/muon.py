"""Muon: momentum whose matrices are orthogonalised, so that a step turns all directions alike."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from megatrain.optim.kinds.adamw import AdamW
from megatrain.optim.optimizer import OPTIMIZER, Optimizer
from megatrain.optim.steps import Steps, Work
from megatrain.optim.whole import Whole

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the published quintic: as steep as can be at 0, so that small singular values grow fastest."""


@OPTIMIZER.register("muon")
@dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """Muon for the matrices inside of a model; another optimiser (`rest`) has its vectors, embeddings and head.

        m <- b m + (1 - b) g       u = (1 - b) g + b m (Nesterov)       w <- w - lr (weight_decay w + scale(w) O(u))

    O(u) has the singular vectors of u and singular values near 1, by a few Newton-Schulz iterations. Queries, keys and
    values, or gate and up, that are fused into one parameter are orthogonalised each by itself, as is each expert. A
    matrix of which several ranks hold parts is brought together on one of them; all ranks have about equally much to
    do.

    Paper: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; at scale Liu et al. 2025, arXiv:2502.16982.
    Differs in nothing.
    """

    momentum: float = 0.95
    nesterov: bool = True
    iterations: int = 5
    product: Literal["fp32", "bf16"] = "fp32"
    """Format of the iterations' products. bf16, the published one, is faster on a GPU, and then layouts agree to its
    rounding only."""
    scale: Literal["match_adamw", "original"] = "match_adamw"
    """match_adamw: 0.2 sqrt(max(m, n)), so that steps are as large as AdamW's and both share learning rate and decay
    (Liu et al. 2025, section 2.2); original: sqrt(max(1, m / n))."""
    leave: tuple[str, ...] = ("*embedding*", "*head.weight", "*positions*")
    """Patterns of matrices that are left to `rest`."""
    rest: Annotated[Any | None, OPTIMIZER, "adamw"] = None
    """Optimiser of what is no matrix or is left; by default adamw with this learning rate, decay and groups."""

    def problems(self) -> list[str]:
        found = super().problems()
        if not 0 <= self.momentum < 1:
            found.append(f"momentum={self.momentum} must be at least 0 and below 1")
        if not 1 <= self.iterations < 100:
            found.append(f"iterations={self.iterations} must be from 1 to 99")
        if isinstance(self.rest, Muon):
            found.append("rest.kind=muon: the rest has no matrices, so give another optimiser")
        if self.rest is not None and not self.lr:
            found.append("lr=0 stops rest too, whose rate stays in proportion to it: set lr above 0")
        if self.rest is not None and self.rest.clip not in (Optimizer.clip, self.clip):
            found.append(f"rest.clip={self.rest.clip} has no effect, gradients are clipped together: set clip")
        return found

    @property
    def others(self) -> Optimizer:
        if self.rest is not None:
            return self.rest
        return AdamW(lr=self.lr, weight_decay=self.weight_decay, groups=self.groups)

    def takes(self, name: str, tensor: Tensor) -> bool:
        return tensor.ndim > 1 and not any(fnmatchcase(name, pattern) for pattern in self.leave)

    def build(self, named: Mapping[str, Tensor]) -> Steps:
        own = {name: t for name, t in named.items() if self.takes(name, t)}
        rest = {name: t for name, t in named.items() if name not in own}
        groups = self.sorted(own)
        for group in self.others.sorted(rest):
            groups.append(group | {"lr_scale": group["lr_scale"] * (self.others.lr / self.lr if self.lr else 1.0)})
        return Steps(groups, self.lr)

    def unmatched(self, named: Mapping[str, Tensor]) -> list[str]:
        found = super().unmatched(named)
        if self.leave != Muon.leave:
            found += [
                f"optimizer.leave has {pattern!r}, which is the name of no parameter"
                for pattern in self.leave
                if not any(fnmatchcase(name, pattern) for name in named)
            ]
        own = {name for name, tensor in named.items() if self.takes(name, tensor)}
        if not own:
            found.append(f"optimizer.leave={list(self.leave)} leaves Muon no matrix: leave fewer, or take rest alone")
        if self.rest is None:  # its groups are then those of both
            return found
        for i, group in enumerate(self.groups):
            matched = {name for name in named if group.matches(name)}
            if matched and not matched & own:
                found.append(
                    f"optimizer.groups.{i}.match is {group.match!r}, which is all left to rest: put it in rest.groups"
                )
        for i, group in enumerate(self.rest.groups):
            matched = {name for name in named if group.matches(name)}
            if matched and matched <= own:
                found.append(
                    f"optimizer.rest.groups.{i}.match is {group.match!r}, which is all Muon's own: put it in "
                    "optimizer.groups"
                )
        return found + [f"rest: {s}" for s in self.rest.unmatched(named)]

    @property
    def states(self) -> tuple[str, ...]:
        return ("momentum",)

    @property
    def moments(self) -> str:
        return "fp32" if self.others.moments == "fp32" else f"fp32, of what is no matrix {self.others.moments}"

    @property
    def sees_whole(self) -> bool:
        return True

    def update(self, work: Work) -> None:
        step, go = work.step, work.step.go
        directions = []
        for p, state in zip(work.tensors, work.states, strict=True):
            gradient, m = step.gradient(p), state["momentum"]
            m.lerp_(gradient, (1 - self.momentum) * go)
            directions.append(gradient.lerp(m, self.momentum) if self.nesterov else m)
            p.mul_(1 - step.lr * step.weight_decay * go)
            state["step"] += go
        assert work.whole is not None
        device = work.tensors[0].device
        for names in work.whole.rounds(work.names):
            flats = {n: held.of(directions[i]) for n, (held, i) in work.held.items() if n in set(names)}
            owned = work.whole.to_owners(flats, names)
            for name, matrix in owned.items():
                self._orthogonalise(matrix, work.whole, name)
            for name, update in work.whole.from_owners(owned, names, device).items():
                held, i = work.held[name]
                held.of(work.tensors[i]).sub_(update.mul_(step.lr * go))

    def _orthogonalise(self, matrix: Tensor, whole: Whole, name: str) -> None:
        """Replace each block of `matrix` by its orthogonalised and scaled self."""
        for first, stop in whole.blocks[name]:
            block = matrix[first:stop]
            block.copy_(orthogonal(block, self.iterations, self.product).float().mul_(self._scale_of(*block.shape)))

    def _scale_of(self, m: int, n: int) -> float:
        if self.scale == "original":
            return math.sqrt(max(1.0, m / n))
        return 0.2 * math.sqrt(max(m, n))


def orthogonal(u: Tensor, iterations: int, product: str = "fp32", least: float = 1e-7) -> Tensor:
    """[m, n] -> [m, n] with the same singular vectors and singular values near 1 (0.7 to 1.2 after five iterations).

    Each iteration maps every singular value x to a x + b x^3 + c x^5 by products alone. The smaller side makes the
    square matrices. The first division brings all singular values below 1, where the iterations hold.
    """
    a, b, c = COEFFICIENTS
    x = u.bfloat16() if product == "bf16" else u
    tall = u.shape[0] > u.shape[1]
    if tall:
        x = x.T
    x = x / x.norm().clamp(min=least)
    for _ in range(iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
