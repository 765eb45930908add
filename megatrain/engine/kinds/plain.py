"""The reference engine: pure torch, gradients all-reduced over the data-parallel ranks, nothing sharded."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.engine.accumulating import plain_passes
from megatrain.engine.api import ENGINE, Engine, EngineCase, Parts, Precision, StepReport
from megatrain.engine.gradients import Gradients, gradients_by_name, gradients_of, sum_partial
from megatrain.engine.passes import mean, summed
from megatrain.nn.batch import Batch
from megatrain.optim.norm import Pieces, clip_divisor, counted_and_copies, global_norm, refused
from megatrain.optim.optimizer import guarded, set_lr, set_step_count, step_count
from megatrain.optim.steps import load
from megatrain.optim.whole import Held
from megatrain.parallel.shard import Slice, shards, slices_of


@ENGINE.register("plain")
@dataclass(frozen=True, kw_only=True)
class Plain:
    """Every data-parallel rank holds all parameters, gradients and optimiser state of its model shard."""

    def unsupported_reasons(self, case: EngineCase) -> list[str]:
        if case.zero:
            return [
                f"the plain engine shards nothing, so layout.zero={case.zero} is not for it: leave layout.zero out, "
                "or set layout.engine=deepspeed"
            ]
        return []

    def build(self, parts: Parts) -> Engine:
        return PlainEngine(parts)


class PlainEngine:
    """Trains a model whose parameters carry their `shard`; with bf16 parameters it keeps float32 masters."""

    def __init__(self, parts: Parts):
        self.parts, self.model, self.device = parts, parts.model, parts.device.torch
        self.data, self.tp, self.pp = (parts.mesh.axis(name) for name in ("data", "tp", "pp"))
        self.shards = shards(self.model)
        self.named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.masters = masters_of(self.model, self.named, parts.precision)
        self.partial = [p for name, p in self.named.items() if self.shards[name].partial]
        self.gradients = self._gradients()
        self.passes = plain_passes(parts)
        self.optimizer = parts.optimizer.build(self.masters)
        whole = [
            Held(name, master, self.shards[name], 0, master.numel(), counted=self.data.rank == 0)
            for name, master in self.masters.items()
        ]
        copies = {self.masters[n]: p.data for n, p in self.named.items()} if parts.precision.masters else None
        self.optimizer.settle(whole, self.shards, parts.mesh.axis("stage"), copies)

    def _gradients(self) -> Gradients:
        return Gradients(list(self.named.values()), self.data)

    def step(self, batch: Batch, lr: float, most_loss: float = math.inf) -> StepReport:
        batch = batch.to(self.device)
        tokens = self.passes.global_tokens(batch)
        try:
            loss_sum = self._gradients_of(batch, tokens)
        except BaseException:
            self._clear()  # a step that is tried again must not find half of this one
            raise
        pieces = Pieces()
        for name, p in self.named.items():
            assert p.grad is not None
            for counted, parts in zip((True, False), counted_and_copies(self.shards[name], p.grad), strict=True):
                for part in parts:
                    pieces.add(name, part, counted)
            self.masters[name].grad = p.grad
        squared, apart = pieces.squares(self.device)
        by_parameter = apart if self.data.rank == 0 else None  # the others count the same copies
        norm = global_norm(squared, (self.tp, self.pp))
        loss = mean(summed(loss_sum, self.data), tokens)
        skipped = refused(norm, loss, most_loss)
        set_lr(self.optimizer, lr)
        with guarded(self.optimizer, clip_divisor(norm, self.parts.optimizer.clip), skipped):
            self.optimizer.step()
        self._clear()
        return StepReport(loss, tokens, norm, skipped, by_parameter)

    def _gradients_of(self, batch: Batch, tokens: Tensor) -> Tensor:
        """Leave the gradient of the global mean loss in the parameters; return this rank's loss sum."""
        loss_sum = self.passes.forward_backward(batch, tokens)
        sum_partial(gradients_of(self.partial), self.tp)
        self.passes.sum_tied(gradients_by_name(self.named))
        self.gradients.reduce()
        return loss_sum

    def _clear(self) -> None:
        self.gradients.clear()
        for master in self.optimizer.copies:
            master.grad = None  # it is the parameter's

    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.passes.evaluate(batch)

    def slices(self) -> Iterator[Slice]:
        """Of copies on several data-parallel ranks only the first rank's are counted."""
        yield from self._weights()
        yield from self.optimizer.slices()

    def _weights(self) -> Iterator[Slice]:
        for name, p in self.model.named_parameters():
            for piece in slices_of("weights", name, self.shards[name], self.masters.get(name, p).data.view(-1)):
                yield dataclasses.replace(piece, counted=piece.counted and self.data.rank == 0)

    @torch.no_grad()
    def load(self, fill: Callable[[Slice], None], states: Callable[[str], bool] = lambda state: True) -> None:
        load(self._weights(), self.optimizer, fill, states)

    def scalars(self) -> dict[str, Any]:
        return {"optimizer_steps": step_count(self.optimizer)}

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        set_step_count(self.optimizer, scalars["optimizer_steps"])

    def close(self) -> None:
        self._clear()


def masters_of(model: nn.Module, named: dict[str, nn.Parameter], precision: Precision) -> dict[str, Tensor]:
    """What the optimiser updates: the parameters, or float32 copies of them, made before they are rounded to bf16."""
    masters: dict[str, Tensor] = dict(named)
    if precision.masters:
        masters = {name: p.detach().to(torch.float32, copy=True) for name, p in named.items()}
    if precision.parameters == "bf16":
        for p in model.parameters():
            p.data = p.data.to(torch.bfloat16)
    return masters
