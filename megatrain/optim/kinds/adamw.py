"""Adam with decoupled weight decay."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from megatrain.base.optional import nvidia_apex
from megatrain.optim.optimizer import OPTIMIZER, Optimizer, beta_problems
from megatrain.optim.steps import Work


@OPTIMIZER.register("adamw")
@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """AdamW in float32: on a CPU by torch's kernel, on a GPU by NVIDIA apex's where its CUDA extensions import, else by
    one of our own, which makes the bf16 weights too.

        m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
        w <- w - lr (weight_decay w + (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps))

    Paper: Loshchilov and Hutter 2017, arXiv:1711.05101, algorithm 2. Differs in that the decay is multiplied by the
    learning rate, as torch and most training recipes have it.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def problems(self) -> list[str]:
        found = super().problems() + beta_problems(self.betas)
        if self.eps <= 0:  # a weight without gradient would be divided 0 by 0
            found.append(f"eps={self.eps} must be above 0")
        return found

    @property
    def states(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def update(self, work: Work) -> None:
        if not work.tensors[0].is_cuda:
            self.update_by_torch(work)
        elif apex := nvidia_apex("amp_C"):
            self.update_by_apex(work, apex)
        else:
            self.update_by_kernel(work)

    def update_by_torch(self, work: Work) -> None:
        adam(
            work.tensors,
            *_lists(work),
            [],
            [state["step"] for state in work.states],
            fused=True,
            grad_scale=work.step.divisor,
            found_inf=work.step.found_inf,
            decoupled_weight_decay=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=work.step.lr,
            weight_decay=work.step.weight_decay,
            eps=self.eps,
            maximize=False,
        )

    def update_by_apex(self, work: Work, kernels: Any) -> None:
        """The same by NVIDIA's kernel, which counts steps for all tensors of a group alike.

        Args:
            kernels: apex's extension `amp_C`.
        """
        step, count = work.step, _counted(work)
        gradients, averages, squares = _lists(work)
        kernels.multi_tensor_adam_capturable(
            APEX_CHUNK,
            step.found_inf.to(torch.int32).view(1),
            [gradients, work.tensors, averages, squares],
            torch.full((1,), step.lr, device=step.divisor.device),
            *self.betas,
            self.eps,
            count.to(torch.int32).view(1),
            DECOUPLED,
            True,  # correct the moments' bias
            step.weight_decay,
            step.divisor.reciprocal().view(1),
        )

    def update_by_kernel(self, work: Work) -> None:
        """The same, in one launch, and with it the copies that the model computes with."""
        from megatrain.optim import adamw_kernel  # Triton comes with torch for GPUs only

        step, count = work.step, _counted(work)
        gradients, averages, squares = _lists(work)
        adamw_kernel.step(
            work.tensors,
            gradients,
            averages,
            squares,
            work.copies,
            count,
            step.divisor,
            step.found_inf,
            step.lr,
            step.weight_decay,
            *self.betas,
            self.eps,
        )
        work.copies.clear()


APEX_CHUNK = 2048 * 32
"""Elements that a block of the kernel takes, as apex's own optimisers have it."""
DECOUPLED = 1
"""The kernel's number for weight decay that is no part of the gradient."""


def _counted(work: Work) -> Tensor:
    """The number of this step, after it was counted: that of the first tensor, for kernels that take one for all."""
    counts = [state["step"] for state in work.states]
    torch._foreach_add_(counts, [work.step.go] * len(counts))  # of one tensor the host would ask for the value
    return counts[0]


def _lists(work: Work) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients, their averages and those of their squares."""
    return (
        [p.grad for p in work.tensors if p.grad is not None],
        [state["exp_avg"] for state in work.states],
        [state["exp_avg_sq"] for state in work.states],
    )
