"""Gradients are summed in float32 whatever the parameters' format: against float64, for every engine.

A power of two of equal values is summed exactly even in bf16; 1,000 is none.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatrain.engine.kinds.deepspeed import DeepSpeed
from megatrain.nn.batch import Batch
from megatrain.optim.kinds.adamw import AdamW
from megatrain.parallel.shard import Part, Shard, initialise, normal, parameter
from tests.engine.toy import Pieces, assembled, connected, pieces_of, rows_of, toy_batch, toy_engine
from tests.ranks import run

MICRO_BATCHES = 1000
EQUAL, RANDOM = 0, 1  # also the numbers of the steps
FIRST_GRADIENT = AdamW(lr=1e-3, betas=(0.0, 0.9), clip=None)
"""Without momentum, exp_avg is the gradient that was applied."""


class Inner(nn.Module):
    """loss = <w, x>, so that the gradient of each micro-batch is x: a third everywhere, or random."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"matrix": (13, 7), "vector": (11,)}
        self.weights = nn.ParameterDict(
            {n: parameter(Shard(s, normal(1.0), parts=(Part(0, s[0]),))) for n, s in shapes.items()}
        )
        self.layers = nn.ModuleDict()
        self.note: Callable[[str, Tensor], None] = lambda name, gradient: None
        """Is given every micro-gradient."""

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        row = int(batch.first_row)
        loss = torch.zeros(())
        for i, (name, p) in enumerate(self.weights.items()):
            w = p.view_as(p)
            w.register_hook(functools.partial(self.note, f"weights.{name}"))
            x = torch.full(w.shape, 1 / 3)
            if batch.step == RANDOM:
                x = torch.randn(w.shape, generator=torch.Generator().manual_seed(2 * row + i))
            loss = loss + (w.float() * x).sum()
        return loss, batch.weights.sum()


def applied_and_summed(kind: str, zero: int) -> list[tuple[Pieces, dict[str, Tensor]]]:
    """For equal and for random micro-gradients: this rank's part of the applied sum, and the float64 sum of its own."""
    mesh = connected()
    model = Inner()
    initialise(model, seed=0)
    options: dict[str, Any] = {"choice": DeepSpeed(persistent_below=0)} if kind == "deepspeed" else {}
    names = [name for name, _ in model.named_parameters()]
    engine = toy_engine(
        kind, zero, mesh, model=model, optimizer=FIRST_GRADIENT, compute="bf16", parameters="bf16", **options
    )
    sums: dict[str, Tensor] = {}
    ranks = 1 if kind == "plain" else mesh.axis("data").size  # the others average, so what they are given is larger

    def note(name: str, gradient: Tensor) -> None:
        assert gradient.dtype == torch.bfloat16
        sums[name] = sums[name] + gradient.double() / ranks

    model.note = note
    found = []
    for step in (EQUAL, RANDOM):
        sums.update({name: torch.zeros((), dtype=torch.float64) for name in names})
        engine.step(rows_of(toy_batch(step, MICRO_BATCHES), mesh), 1e-3)
        found.append(([p for p in pieces_of(engine) if p[0].state == "exp_avg"], dict(sums)))
    engine.close()
    return found


@pytest.mark.parametrize(
    ("kind", "zero", "ranks"),
    [("plain", 0, 2), *(("deepspeed", z, 2) for z in range(4)), *(("fsdp2", z, 2) for z in (2, 3))],
)
def test_a_thousand_bf16_gradients_are_summed_to_a_thousandth(kind, zero, ranks):
    found = run(applied_and_summed, ranks, kind, zero)
    for which in (EQUAL, RANDOM):
        applied = assembled([rank[which][0] for rank in found])
        for name in ("weights.matrix", "weights.vector"):
            exact = sum(rank[which][1][name] for rank in found)
            error = (
                applied["exp_avg", name].double() - exact.reshape(applied["exp_avg", name].shape)
            ).norm() / exact.norm()
            assert error < 1e-3, f"{name}: {error}"


def test_a_sum_in_bf16_would_fail_here():
    """The data of this test can tell the difference."""
    total = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(MICRO_BATCHES):
        total += torch.tensor(1 / 3, dtype=torch.bfloat16)
    assert abs(float(total) / MICRO_BATCHES * 3 - 1) > 0.1
