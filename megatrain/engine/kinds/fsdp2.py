"""Fully sharded data parallelism (Zhao et al. 2023, arXiv:2304.11277) by torch's `fully_shard` over plain layers.

Each rank keeps its rows of every parameter in float32, which is also what the optimiser works on; a block's parameters
are gathered before it runs, in the format of the run, and gradients are reduce-scattered in float32.

| zero | after forward a block's gathered parameters are |
|---|---|
| 2 | kept until backward: less traffic |
| 3 | dropped and gathered again: less memory |
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.engine.api import ENGINE, Engine, EngineCase, Parts, StepReport, no_masters
from megatrain.engine.gradients import sum_partial
from megatrain.engine.groups import connected
from megatrain.engine.passes import mean, summed
from megatrain.engine.pipeline import passes_of
from megatrain.models.stages import Stages
from megatrain.nn.batch import Batch
from megatrain.nn.precision.quantised import Quantised
from megatrain.nn.precision.select import linears
from megatrain.nn.precision.sharded import Agreed, ShardedWeight, agree
from megatrain.optim.norm import Pieces, clip_divisor, global_norm, refused
from megatrain.optim.optimizer import guarded, set_lr, set_step_count, step_count
from megatrain.optim.steps import load
from megatrain.optim.whole import Held
from megatrain.parallel.mesh import Axis
from megatrain.parallel.shard import Shard, Slice, shards, slices_of


@ENGINE.register("fsdp2")
@dataclass(frozen=True, kw_only=True)
class Fsdp2:
    """torch's own sharding of parameters, gradients and optimiser state."""

    def unsupported_reasons(self, case: EngineCase) -> list[str]:
        if case.zero not in (2, 3):
            return [
                f"the fsdp2 engine shards gradients and parameters always, so layout.zero={case.zero} is not for it: "
                "set 2 or 3, or set layout.engine=deepspeed"
            ]
        reasons = no_masters(case, "fully_shard")
        if case.pp > 1 and case.zero == 3:
            reasons.append(
                f"layout.zero=3 with layout.pp={case.pp}: under the fsdp2 engine a pipeline stage keeps its gathered "
                "parameters from its first forward to its last backward: set layout.zero=2, or layout.engine=deepspeed"
            )
        if case.tied and case.schedule is not None and case.schedule.placement == "v":
            reasons.append(
                "fully_shard cannot share an embedding between the first and the last stage, which this schedule puts "
                "on one rank: set model.tie_embeddings=false, layout.engine=deepspeed, or "
                "layout.schedule=interleaved_zero_bubble"
            )
        return reasons

    def build(self, parts: Parts) -> Engine:
        return Fsdp2Engine(parts)


@dataclass(frozen=True)
class Rows:
    """This rank's rows of a parameter: a flat range, beginning at `start`, of what its tensor-parallel rank holds."""

    parameter: nn.Parameter
    """A DTensor over the data-parallel ranks."""
    master: Tensor
    """float32, the very memory of its local part; the optimiser works on it."""
    shard: Shard
    start: int

    @property
    def gradient(self) -> Tensor:
        """float32, this rank's rows of the reduced gradient."""
        grad: Any = self.parameter.grad
        return torch.zeros_like(self.master) if grad is None else grad.to_local()


class Fsdp2Engine:
    """Shards a model over the data-parallel ranks. `fully_shard` makes new Parameters, so facts are kept by name."""

    def __init__(self, parts: Parts):
        self.parts, self.model, self.device = parts, parts.model, parts.device.torch
        mesh = connected(parts.mesh)
        self.data, self.tp, self.pp = (mesh.axis(name) for name in ("data", "tp", "pp"))
        known = shards(self.model)
        self.passes = passes_of(parts, mesh)  # before parameters are replaced and forget their shards
        gather_in_eight_bits(self.model, self.data)
        self.sharded = shard_model(self.model, self.data, parts)
        self.row, self.in_eight_bits = mesh.axis("row"), list(sharded_weights(self.model))
        self.rows = {name: rows_of(p, known[name], self.data) for name, p in self.model.named_parameters()}
        trained = {name: h.master for name, h in self.rows.items() if h.parameter.requires_grad}
        self.optimizer = parts.optimizer.build(trained)
        held = [Held(n, master, known[n], self.rows[n].start, master.numel()) for n, master in trained.items()]
        self.optimizer.settle(held, known, mesh.axis("stage"))

    def step(self, batch: Batch, lr: float, most_loss: float = math.inf) -> StepReport:
        batch = batch.to(self.device)
        agree(self.in_eight_bits, self.row)
        tokens = self.passes.global_tokens(batch)
        divisor = tokens / self.data.size  # fully_shard averages over the ranks
        loss_sum = self.passes.forward_backward(batch, divisor, self._backward)
        squared, by_parameter = self._pieces().squares(self.device)
        norm = global_norm(squared, (self.data, self.tp, self.pp))
        loss = mean(summed(loss_sum, self.data), tokens)
        skipped = refused(norm, loss, most_loss)
        set_lr(self.optimizer, lr)
        with guarded(self.optimizer, clip_divisor(norm, self.parts.optimizer.clip), skipped):
            self.optimizer.step()
        for h in self.rows.values():
            h.parameter.grad = h.master.grad = None
        return StepReport(loss, tokens, norm, skipped, by_parameter)

    def _backward(self, loss: Tensor, last: bool) -> None:
        """Gradients of all but the last micro-batch stay whole on each rank, in float32, and are reduced with its."""
        self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        loss.backward()

    def _pieces(self) -> Pieces:
        """This rank's rows of the gradient: those it counts in the norm, and those another tp rank counts."""
        trained = {name: h for name, h in self.rows.items() if h.parameter.requires_grad}
        for h in trained.values():
            h.master.grad = h.gradient
        sum_partial(
            ((h.shard, h.master.grad.view(-1), h.start) for h in trained.values() if h.master.grad is not None), self.tp
        )
        self.passes.sum_tied({n: h.master.grad for n, h in self.rows.items() if h.master.grad is not None})
        pieces = Pieces()
        for name, h in trained.items():
            assert h.master.grad is not None
            flat = h.master.grad.reshape(-1)
            for piece in h.shard.boxes(h.start, flat.numel()) if flat.numel() else ():
                pieces.add(name, flat.narrow(0, piece.offset, piece.box.numel), piece.counted)
        return pieces

    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        agree(self.in_eight_bits, self.row)
        result = self.passes.evaluate(batch)
        for module in self.sharded:  # what it gathered must not outlive the weights
            module.reshard()
        return result

    # --------------------------------------------------------------------------------- its state

    def slices(self) -> Iterator[Slice]:
        yield from self._weights()
        yield from self.optimizer.slices()

    def _weights(self) -> Iterator[Slice]:
        for name, h in self.rows.items():
            if h.master.numel():
                yield from slices_of("weights", name, h.shard, h.master.view(-1), h.start)

    @torch.no_grad()
    def load(self, fill: Callable[[Slice], None], states: Callable[[str], bool] = lambda state: True) -> None:
        load(self._weights(), self.optimizer, fill, states)

    def scalars(self) -> dict[str, Any]:
        return {"optimizer_steps": step_count(self.optimizer)}

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        set_step_count(self.optimizer, scalars["optimizer_steps"])

    def close(self) -> None:
        for h in self.rows.values():
            h.parameter.grad = h.master.grad = None


def shard_model(model: Any, data: Axis, parts: Parts) -> list[Any]:
    """Shard each block, then the rest, over the ranks of `data`: the modules that were sharded.

    The stages of a pipeline are models of their own.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    assert data.group is not None
    mesh = DeviceMesh.from_group(data.group, parts.device.kind)
    bf16 = parts.precision.parameters == "bf16"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    blocks = list(model.layers.values())
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=parts.zero == 3)
    roots = [stage for _, stage in model.stages] if isinstance(model, Stages) else [model]
    for root in roots:
        fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return blocks + roots


def gather_in_eight_bits(model: nn.Module, data: Axis) -> None:
    """Let weights that are multiplied in eight bits by one scale travel over the ranks of `data` in eight bits.

    Those that the ranks cannot share evenly stay as they are: fully_shard pads a copy of them.
    """
    for layer in linears(model).values():
        product, even = layer.product, layer.weight.shape[0] % data.size == 0
        if isinstance(product, Quantised) and product.recipe.one_scale and even:
            weight, product.rows_over = layer.weight, data
            recipe: Any = product.recipe  # of one scale
            agreed, scale = Agreed(recipe, data, torch.bfloat16), torch.zeros((), device=weight.device)
            layer.weight = nn.Parameter(ShardedWeight(weight.detach(), scale, agreed), weight.requires_grad)


def sharded_weights(model: nn.Module) -> Iterator[ShardedWeight]:
    locals_: Iterator[Any] = (p.to_local().detach() for p in model.parameters())  # type: ignore[attr-defined]
    return (local for local in locals_ if isinstance(local, ShardedWeight))


def rows_of(p: Any, shard: Shard, data: Axis) -> Rows:
    """What this rank holds of `p`: whole rows of it, cut as `torch.chunk` cuts them."""
    local = p.to_local().detach()
    local = local.rows if isinstance(local, ShardedWeight) else local
    shape = shard.local_shape
    each = -(-shape[0] // data.size)
    first = min(shape[0], data.rank * each)
    return Rows(p, local, shard, first * math.prod(shape[1:]))
