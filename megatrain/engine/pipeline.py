"""Forward and backward over the micro-batches of a step where a rank holds some stages of the model only.

Whatever the engine, a pipeline is driven alike: torch's schedules run the stages (`engine.torch_pipelining`), the rest
is here: what a micro-batch is, the loss on every rank, evaluation, and embeddings that both ends of the pipeline have.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatrain.engine.api import Parts
from megatrain.engine.passes import Passes, factor_of, summed
from megatrain.engine.schedules import PipelinePlan
from megatrain.models.stages import Stages
from megatrain.nn.batch import Batch
from megatrain.parallel.deferred import DeferredProduct, WeightGradientQueue, defer_weight_gradients
from megatrain.parallel.mesh import Axis, Mesh


def passes_of(parts: Parts, mesh: Mesh) -> Passes:
    """How an engine runs its model: through a pipeline where there is one."""
    common: Any = {
        "data": mesh.axis("data"),
        "micro_batch": parts.micro_batch,
        "device": parts.device.torch,
        "autocast": parts.precision.autocast,
    }
    if parts.pipeline is None:
        return Passes(parts.model, **common)
    if not isinstance(parts.model, Stages):
        raise TypeError("a pipeline needs the model as Stages")
    dtype = torch.bfloat16 if parts.precision.parameters == "bf16" else torch.float32
    return PipelinePasses(model=parts.model, plan=parts.pipeline, pp=mesh.axis("pp"), dtype=dtype, **common)


@dataclass
class _Step:
    """The step that is under way."""

    micro_batches: list[Batch] = field(default_factory=list)
    factor: Tensor = field(default_factory=lambda: torch.ones(()))
    """What losses are multiplied by before their backward."""
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Their sum so far."""


@dataclass(frozen=True, kw_only=True)
class PipelinePasses(Passes):
    """Runs this rank's stages over its rows of global batches; ranks of `pp` share the rows."""

    model: Stages
    plan: PipelinePlan
    pp: Axis
    dtype: torch.dtype
    """Of hidden states between stages."""
    _now: _Step = field(default_factory=_Step, init=False)
    _schedules: dict[Any, Callable[[], None]] = field(default_factory=dict, init=False)
    _deferred: dict[int, tuple[WeightGradientQueue, list[DeferredProduct]]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.plan.schedule.splits_backward:
            self._deferred.update({number: defer_weight_gradients(stage) for number, stage in self.model.stages})

    # --------------------------------------------------------------------------------- training

    def forward_backward(self, batch: Batch, divisor: Tensor, backward: Any = None) -> Tensor:
        """Add the gradients of (loss sum / divisor) to the parameters' of this rank's stages; return the loss sum.

        It is known on every rank of the pipeline. Schedules call backward themselves.
        """
        now = self._now
        now.micro_batches = list(batch.split(self.micro_batch))
        now.factor = factor_of(divisor)
        now.total = torch.zeros((), dtype=torch.float32, device=self.device)
        self._schedule(now.micro_batches)()
        now.micro_batches = []
        return summed(now.total, self.pp)

    def _schedule(self, micro_batches: list[Batch]) -> Callable[[], None]:
        """A step of the schedule for so many micro-batches of this size; buffers are made once for each size."""
        shape = self._hidden_shape(micro_batches[0])
        key = (len(micro_batches), shape)
        if key not in self._schedules:
            from megatrain.engine import torch_pipelining as torch_  # slow to import, and needed in pipelines only

            stages = [
                torch_.LocalStage(number, stage, self._forward_of(number, stage), self._pay_of(number))
                for number, stage in self.model.stages
            ]
            hidden = torch.empty(shape, dtype=self.dtype, device="meta")
            self._schedules.clear()  # sequences that have grown do not shrink again
            self._schedules[key] = torch_.build_schedule(
                self.plan, self.pp, stages, hidden, self.device, len(micro_batches), self._scaled
            )
        return self._schedules[key]

    def _hidden_shape(self, micro: Batch) -> tuple[int, ...]:
        stage: Any = self.model.stages[0][1]
        return stage.hidden_shape(micro)

    def _forward_of(self, number: int, stage: nn.Module) -> Callable[[int, tuple[Tensor, ...]], Tensor]:
        last = number == self.plan.n_stages - 1
        _, products = self._deferred.get(number, (None, []))

        def forward(micro_batch: int, received: tuple[Tensor, ...]) -> Tensor:
            micro = self._now.micro_batches[micro_batch]
            b, t = micro.own(micro.tokens).shape
            for product in products:
                product.tap(b, t, self.autocast or self.dtype, self.device)
            with self.number_format():
                out = stage(micro, *received)
            return out[0] if last else out

        return forward

    def _pay_of(self, number: int) -> Callable[[], Callable[[], None]] | None:
        return self._deferred[number][0].take if number in self._deferred else None

    def _scaled(self, loss_sum: Tensor) -> Tensor:
        """What the last stage's backward begins with."""
        self._now.total += loss_sum.detach()
        return loss_sum * self._now.factor

    # --------------------------------------------------------------------------------- tied embeddings

    def tied(self) -> tuple[str, ...]:
        """Names of parameters of which this rank and the one at the other end of the pipeline have a copy each."""
        if self.plan.rank_of(0) == self.plan.rank_of(self.plan.n_stages - 1):
            return ()
        if self.pp.rank not in (0, self.pp.size - 1):
            return ()
        stages: list[Any] = [stage for _, stage in self.model.stages]
        return tuple(name for stage in stages for name in stage.at_both_ends)

    def sum_tied(self, gradients: Mapping[str, Tensor]) -> None:
        """Give both copies the sum of their gradients, in place. `a + b` and `b + a` are the same bits."""
        other = self.pp.ranks[self.pp.size - 1 - self.pp.rank]
        for name in self.tied():
            mine = gradients.get(name)
            if mine is None or mine.numel() == 0:  # it is not trained, or other data-parallel ranks have its rows
                continue
            theirs = torch.empty_like(mine)
            exchange = [
                dist.P2POp(dist.isend, mine.contiguous(), other, self.pp.group),
                dist.P2POp(dist.irecv, theirs, other, self.pp.group),
            ]
            for work in dist.batch_isend_irecv(exchange):
                work.wait()
            mine += theirs

    # --------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(loss sum, token count) over all ranks' rows, known everywhere: forward only, stage after stage."""
        batch = batch.to(self.device)
        for _, products in self._deferred.values():
            for product in products:
                product.untap()
        training = self.model.training
        self.model.eval()
        try:
            total = self._losses(list(batch.split(self.micro_batch)))
        finally:
            self.model.train(training)
        loss_sum, count = summed(summed(total, self.pp), self.data).unbind()
        return loss_sum, count

    def _losses(self, micro_batches: list[Batch]) -> Tensor:
        """(loss sum, count) of these micro-batches on the last rank, zeros on the others."""
        total = torch.zeros(2, dtype=torch.float32, device=self.device)
        outputs: list[Any] = []
        sent = []
        for number, stage in self.model.stages:
            before, after = self._rank_of(number - 1), self._rank_of(number + 1)
            inputs, outputs = outputs, []
            for i, micro in enumerate(micro_batches):
                received = (inputs[i],) if before == self.pp.rank else self._received(micro, before)
                with self.number_format():
                    outputs.append(stage(micro, *received))
                if after not in (None, before, self.pp.rank):
                    sent.append(self._send(outputs[i], after))
            if after is None:
                total += torch.stack([torch.stack(out) for out in outputs]).sum(0)
            elif after == before:  # once all has come from there: two ranks that both send first would wait for ever
                sent += [self._send(out, after) for out in outputs]
        for work, _ in sent:
            work.wait()
        return total

    def _rank_of(self, stage: int) -> int | None:
        """The place along pp of the rank that holds `stage`; None where there is no such stage."""
        return self.plan.rank_of(stage) if 0 <= stage < self.plan.n_stages else None

    def _send(self, hidden: Tensor, rank: int | None) -> tuple[Any, Tensor]:
        """Begin to send; the tensor must live until the work is done."""
        assert rank is not None
        hidden = hidden.contiguous()
        return dist.isend(hidden, self.pp.ranks[rank], group=self.pp.group), hidden

    def _received(self, micro: Batch, rank: int | None) -> tuple[Tensor, ...]:
        if rank is None:
            return ()
        hidden = torch.empty(self._hidden_shape(micro), dtype=self.dtype, device=self.device)
        dist.recv(hidden, self.pp.ranks[rank], group=self.pp.group)
        return (hidden,)
