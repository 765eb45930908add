"""Adam with decoupled weight decay."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatrain.optim.optimizer import OPTIMIZER, Group, parameter_groups, unmatched


@OPTIMIZER.register("adamw")
@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW in float32, by torch's fused kernel.

        m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
        w <- w - lr (weight_decay w + (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps))

    Paper: Loshchilov and Hutter 2017, arXiv:1711.05101, algorithm 2. Differs in that the decay is multiplied by the
    learning rate, as torch and most training recipes have it.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float | None = 1.0
    """Largest 2-norm of the whole gradient; null leaves it as it is."""
    groups: tuple[Group, ...] = ()

    def problems(self) -> list[str]:
        found = []
        if self.lr < 0:
            found.append(f"lr={self.lr} must be at least 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            found.append(f"betas={list(self.betas)} must each be at least 0 and below 1")
        if self.eps < 0:
            found.append(f"eps={self.eps} must be at least 0")
        if self.weight_decay < 0:
            found.append(f"weight_decay={self.weight_decay} must be at least 0")
        if self.clip is not None and self.clip <= 0:
            found.append(f"clip={self.clip} must be above 0; write null to leave gradients as they are")
        return found

    @property
    def states(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def build(self, named: Mapping[str, Tensor]) -> torch.optim.AdamW:
        groups = parameter_groups(named, self.weight_decay, self.groups)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)

    def allocate(self, optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor]) -> None:
        for p in tensors:
            if not optimizer.state[p]:
                step = torch.zeros((), dtype=torch.float32, device=p.device)
                optimizer.state[p] = {"step": step} | {state: torch.zeros_like(p.data) for state in self.states}

    def unmatched(self, names: Iterable[str]) -> list[str]:
        return unmatched(self.groups, names)
