"""Adam with decoupled weight decay."""

from dataclasses import dataclass

from torch.optim.adam import adam

from megatrain.optim.optimizer import OPTIMIZER, Optimizer, beta_problems
from megatrain.optim.steps import Work


@OPTIMIZER.register("adamw")
@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """AdamW in float32, by torch's fused kernel.

        m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
        w <- w - lr (weight_decay w + (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps))

    Paper: Loshchilov and Hutter 2017, arXiv:1711.05101, algorithm 2. Differs in that the decay is multiplied by the
    learning rate, as torch and most training recipes have it.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def problems(self) -> list[str]:
        found = super().problems() + beta_problems(self.betas)
        if self.eps < 0:
            found.append(f"eps={self.eps} must be at least 0")
        return found

    @property
    def states(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def update(self, work: Work) -> None:
        adam(
            work.tensors,
            [p.grad for p in work.tensors if p.grad is not None],
            [state["exp_avg"] for state in work.states],
            [state["exp_avg_sq"] for state in work.states],
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
