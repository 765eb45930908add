"""Lion: steps of one size in every element, by the sign of a momentum."""

from dataclasses import dataclass

from megatrain.optim.optimizer import OPTIMIZER, Optimizer, beta_problems
from megatrain.optim.steps import Work


@OPTIMIZER.register("lion")
@dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
    """Lion in float32; its one moment takes half the memory of Adam's two.

        w <- w - lr (weight_decay w + sign(b1 m + (1 - b1) g))          m <- b2 m + (1 - b2) g

    The learning rate is to be three to ten times smaller than AdamW's, and the weight decay as much larger.

    Paper: Chen et al. 2023, arXiv:2302.06675, program 1. Differs in nothing.
    """

    betas: tuple[float, float] = (0.9, 0.99)

    def problems(self) -> list[str]:
        return super().problems() + beta_problems(self.betas)

    @property
    def states(self) -> tuple[str, ...]:
        return ("exp_avg",)

    def update(self, work: Work) -> None:
        step, (b1, b2) = work.step, self.betas
        go = step.go
        for p, state in zip(work.tensors, work.states, strict=True):
            gradient, m = step.gradient(p), state["exp_avg"]
            direction = m.lerp(gradient, 1 - b1).sign_()
            p.mul_(1 - step.lr * step.weight_decay * go).sub_(direction.mul_(step.lr * go))
            m.lerp_(gradient, (1 - b2) * go)
            state["step"] += go
