"""A look at what eight bits cost: every so many steps each quantised layer is compared with bf16.

The guard wraps an engine and works between its steps: it evaluates a micro-batch twice, once as the run computes and
once with all layers in bf16. On the way each quantised layer adds up the error of its output. A layer that is off by
more than the limit is demoted to bf16; one that is back below half of it is promoted again. All ranks put their sums
together first, so they decide alike. What was decided is handed to the layers as values, and travels in checkpoints.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.engine.api import Engine, StepReport
from megatrain.nn.batch import Batch
from megatrain.nn.precision.quantised import Quantised
from megatrain.parallel.mesh import Axis
from megatrain.parallel.shard import Slice

PROMOTED_BELOW = 0.5
"""Share of the limit below which a demoted layer is promoted: a gap, so that it does not go to and fro."""


@dataclass(frozen=True)
class Verdict:
    """What one look found. Values are those of the whole model, the same on every rank."""

    step: int
    """Steps taken before it."""
    errors: dict[str, float]
    """Relative error of each layer's output: root of the sum of squared differences over that of squares."""
    saturated: dict[str, float]
    """Share of each layer's operands that stand at the end of the format."""
    flushed: dict[str, float]
    """Share of them that became 0 and were not."""
    demoted: list[str]
    promoted: list[str]
    in_bf16: list[str]
    """Layers that are demoted from now on."""
    loss_gap: float
    """Loss as the run computes less loss with all layers in bf16, nats a token, on one micro-batch."""


@dataclass
class Guard:
    """Watches the quantised layers of this rank.

    Args:
        products: by the full name of the layer; other ranks may hold parts of the same or other layers.
        every: steps from one look to the next.
        limit: relative error beyond which a layer is demoted.
        world: all ranks.
        counted: this rank has the row that a look takes, the first of the global batch, so that no layout chooses
            it; the others take part, and what they see is left out.
    """

    products: Mapping[str, Quantised]
    every: int
    limit: float
    world: Axis
    counted: bool = True
    in_bf16: set[str] = field(default_factory=set)
    """Layers of the whole model that are demoted."""
    latest: Verdict | None = None

    def due(self, step: int) -> bool:
        """Before a step that follows so many."""
        return step % self.every == 0

    def look(
        self, step: int, batch: Batch, evaluate: Callable[[Batch], tuple[Tensor, Tensor]], device: torch.device
    ) -> Verdict:
        """Compare, decide and tell the layers. Every rank calls it with its rows of the same global batch."""
        micro = next(iter(batch.split(1)))
        if not self.counted:
            micro = dataclasses.replace(micro, weights=torch.zeros_like(micro.weights))
        with torch.compiler.set_stance("force_eager"):  # so that blocks are not compiled for two passes more
            with self._measuring(device) as sums:
                loss, count = (float(x) for x in evaluate(micro))
            with self._all_in_bf16():
                exact, _ = (float(x) for x in evaluate(micro))
        found = self._together({name: total.tolist() for name, total in sums.items()} if self.counted else {})
        self.latest = self._decide(step, found, (loss - exact) / count if count else 0.0)
        self.tell()
        return self.latest

    def tell(self) -> None:
        """Hand the decisions to this rank's layers."""
        for name, product in self.products.items():
            product.demoted = name in self.in_bf16

    def _decide(self, step: int, found: dict[str, list[float]], loss_gap: float) -> Verdict:
        errors = {name: _relative(error, size) for name, (error, size, *_) in found.items()}
        demoted = [n for n, e in errors.items() if n not in self.in_bf16 and not e <= self.limit]
        promoted = [n for n, e in errors.items() if n in self.in_bf16 and e <= PROMOTED_BELOW * self.limit]
        self.in_bf16 = (self.in_bf16 | set(demoted)) - set(promoted)
        saturated, flushed = ({n: row[k] / max(1.0, row[4]) for n, row in found.items()} for k in (2, 3))
        return Verdict(step, errors, saturated, flushed, demoted, promoted, sorted(self.in_bf16), loss_gap)

    def _together(self, mine: dict[str, list[float]]) -> dict[str, list[float]]:
        """Each layer's sums over all ranks."""
        everyones: list[Any] = [mine]
        if self.world.size > 1:
            everyones = [None] * self.world.size
            dist.all_gather_object(everyones, mine, group=self.world.group)
        names = sorted({name for of_rank in everyones for name in of_rank})
        return {
            name: [sum(row) for row in zip(*(of_rank[name] for of_rank in everyones if name in of_rank), strict=True)]
            for name in names
        }

    @contextlib.contextmanager
    def _measuring(self, device: torch.device) -> Iterator[dict[str, Tensor]]:
        sums = {name: torch.zeros(5, device=device) for name in self.products}
        for name, product in self.products.items():
            product.measuring = sums[name]
        try:
            yield sums
        finally:
            for product in self.products.values():
                product.measuring = None

    @contextlib.contextmanager
    def _all_in_bf16(self) -> Iterator[None]:
        for product in self.products.values():
            product.demoted = True
        try:
            yield
        finally:
            self.tell()


def _relative(error: float, size: float) -> float:
    """Relative error from sums of squares; infinite where one is no number."""
    if not math.isfinite(error + size):
        return math.inf
    return math.sqrt(error / size) if size else math.inf if error else 0.0


class Guarded:
    """An engine whose quantised layers are watched."""

    def __init__(self, engine: Engine, guard: Guard, device: torch.device):
        self.engine, self.guard, self.device = engine, guard, device
        self.parts = engine.parts
        self.steps: int | None = None
        """Taken so far, which is where the data stands unless a run went back without it."""

    def step(self, batch: Batch, lr: float, most_loss: float = math.inf) -> StepReport:
        taken = batch.step if self.steps is None else self.steps
        if self.guard.due(taken):
            self.guard.look(taken, batch.to(self.device), self.engine.evaluate, self.device)
        self.steps = taken + 1
        return self.engine.step(batch, lr, most_loss)

    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.engine.evaluate(batch)

    def slices(self) -> Iterator[Slice]:
        return self.engine.slices()

    def load(self, fill: Callable[[Slice], None], states: Callable[[str], bool] = lambda state: True) -> None:
        self.engine.load(fill, states)

    def scalars(self) -> dict[str, Any]:
        return self.engine.scalars() | {"layers_in_bf16": sorted(self.guard.in_bf16), "guarded_steps": self.steps}

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        self.engine.load_scalars(scalars)
        self.guard.in_bf16 = set(scalars.get("layers_in_bf16", ()))
        self.steps = scalars.get("guarded_steps")
        self.guard.tell()

    def close(self) -> None:
        self.engine.close()
