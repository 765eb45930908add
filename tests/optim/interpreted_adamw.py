"""The kernel behind AdamW on a GPU, on CPU tensors, in Triton's interpreter. A process of its own: the mode is chosen
once."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from torch import Tensor, nn

from megatrain.optim import adamw_kernel
from megatrain.optim.kinds.adamw import AdamW
from megatrain.optim.optimizer import Group
from tests.optim.test_optimizer import guarded_step, settle

SHAPES = {"a": (3, 5), "none": (0, 4), "tiles": (3, adamw_kernel.TILE), "edge": (adamw_kernel.TILE,), "one": (1,)}
EPS, DECAY = 1e-8, 0.1


class ByKernel(AdamW):
    def update(self, work):
        self.update_by_kernel(work)


def exact_step(state: dict[str, Tensor], g: Tensor, t: int, lr: float, betas: tuple[float, float]) -> None:
    """The paper's algorithm 2 in float64, the decay multiplied by the learning rate."""
    m = state["exp_avg"] = betas[0] * state["exp_avg"] + (1 - betas[0]) * g
    v = state["exp_avg_sq"] = betas[1] * state["exp_avg_sq"] + (1 - betas[1]) * g * g
    m, v = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    state["weights"] = state["weights"] - lr * (DECAY * state["weights"] + m / (v.sqrt() + EPS))


def check(betas: tuple[float, float], *, copying: bool, shifted: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(shape) -> Tensor:
        flat = torch.randn(1 + torch.Size(shape).numel(), generator=generator)
        return (flat[1:] if shifted else flat[1:].clone()).view(shape)  # shifted: not at a multiple of 16 bytes

    masters = {name: nn.Parameter(random(shape)) for name, shape in SHAPES.items()}
    exact = {name: {"weights": p.detach().double(), "exp_avg": 0.0, "exp_avg_sq": 0.0} for name, p in masters.items()}
    copies = {p: p.detach().bfloat16() for p in masters.values()} if copying else {}
    optimizer = ByKernel(lr=0.1, betas=betas, eps=EPS, groups=(Group(match="*", weight_decay=DECAY),)).build(masters)
    settle(optimizer, masters, copies)
    for t, refused in ((1, False), (None, True), (2, False), (3, False)):
        for name, p in masters.items():
            gradient = random(p.shape) * 2.0**t if t else torch.full_like(p, float("nan"))
            by_columns = p.ndim > 1  # as a product may leave it
            p.grad = gradient.mT.contiguous().mT if by_columns else gradient
            if not refused:
                exact_step(exact[name], gradient.double() / 3, t, 0.1, betas)
        before = {name: p.detach().clone() for name, p in masters.items()}
        guarded_step(optimizer, torch.tensor(3.0), torch.tensor(float(refused)))
        for name, p in masters.items():
            assert not refused or torch.equal(p, before[name])
            state = optimizer.state[p] | {"weights": p.detach()}
            for what, expected in exact[name].items():
                found = state[what]
                torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=3e-7)
            if copying:  # the interpreter cuts digits off where a card rounds
                torch.testing.assert_close(copies[p].float(), p.detach(), rtol=2**-7, atol=0)


def main() -> None:
    check((0.9, 0.95), copying=True, shifted=False)
    check((0.0, 0.999), copying=False, shifted=True)
    for wrong in (torch.ones(4, 6).T, torch.ones(6, 4).bfloat16(), torch.ones(5, 4)):
        one, count = torch.ones(6, 4), torch.ones(())
        with pytest.raises(ValueError, match="without gaps"):
            adamw_kernel.step([one], [one], [wrong], [one], [], count, count, count, 0.1, 0.0, 0.9, 0.9, EPS)
    print("equal")


if __name__ == "__main__":
    main()
