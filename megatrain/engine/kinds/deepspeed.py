"""ZeRO data parallelism (Rajbhandari et al. 2020, arXiv:1910.02054) by DeepSpeed.

DeepSpeed shards and reduces; the loop over micro-batches, the norm, the clip and the decision to skip are ours. It is
given one optimiser step at a time (no accumulation of its own) and a plain torch optimiser, in which it puts flat
float32 partitions in the place of the parameters, one for each parameter group.

| stage | gradients are reduced | bf16 gradients are summed in float32 by |
|---|---|---|
| 0 | once a step | autograd, into float32 gradients of the parameters |
| 1 | once a step | the same |
| 2, 3 | with every micro-batch, since each rank keeps only its partition | DeepSpeed, into float32 partitions |

Under a pipeline all stages do as stage 1: a schedule has several micro-batches under way at once.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.base.errors import ConfigError
from megatrain.engine.api import ENGINE, Engine, EngineCase, Parts, StepReport, no_masters
from megatrain.engine.deepspeed_package import initialize, keep_compiled_blocks_whole, zero_config
from megatrain.engine.gradients import Gradients, gradients_by_name, gradients_of, sum_partial
from megatrain.engine.groups import connected
from megatrain.engine.kinds.plain import PlainEngine
from megatrain.engine.passes import Passes, mean, summed
from megatrain.engine.pipeline import passes_of
from megatrain.nn.batch import Batch
from megatrain.optim.norm import Pieces, clip_divisor, global_norm, refused
from megatrain.optim.optimizer import guarded, set_lr, set_step_count, step_count
from megatrain.optim.steps import load
from megatrain.optim.whole import Held
from megatrain.parallel.mesh import ALONE
from megatrain.parallel.shard import Shard, Slice, shard_of, shards, slices_of


@ENGINE.register("deepspeed")
@dataclass(frozen=True, kw_only=True)
class DeepSpeed:
    """DeepSpeed's ZeRO, stages 0 to 3."""

    persistent_below: int = 100_000
    """Stage 3 keeps parameters of fewer elements whole on every rank: gathering them would cost more than it saves."""

    def unsupported_reasons(self, case: EngineCase) -> list[str]:
        reasons = no_masters(case, "DeepSpeed") if case.zero else []
        if case.zero == 3 and case.tied_copies:
            reasons.append(
                f"layout.zero=3 with layout.pp={case.pp} and tied embeddings: DeepSpeed takes the gradients of the two "
                "copies, on the first and the last stage, apart before they are summed: set layout.zero=2, "
                "model.tie_embeddings=false, or layout.schedule to zbv or dualpipev, which keep both on one rank"
            )
        if case.zero == 3 and case.pp > 1 and case.precision.parameters == "bf16":
            reasons.append(
                f"layout.zero=3 with layout.pp={case.pp} rounds summed gradients to bf16: set layout.zero=2, "
                "layout.engine=fsdp2, or precision.parameters=fp32"
            )
        return reasons

    def build(self, parts: Parts) -> Engine:
        return ZeroEngine(parts, self) if parts.zero else AllReduceEngine(parts)


# ------------------------------------------------------------------------------------------------ stage 0


class AllReduceEngine(PlainEngine):
    """Stage 0 shards nothing: DeepSpeed all-reduces the gradients, the rest is the plain engine's."""

    def __init__(self, parts: Parts):
        super().__init__(parts)
        mesh = connected(parts.mesh)
        # it is not told of bf16 parameters: it only reduces their gradients, which are float32
        self.engine = initialize(self.model, self.optimizer, mesh, parts.device, {"zero_optimization": {"stage": 0}})

    def _gradients(self) -> Gradients:
        return Gradients(list(self.named.values()), ALONE)

    def _gradients_of(self, batch: Batch, tokens: Tensor) -> Tensor:
        loss_sum = self.passes.forward_backward(batch, tokens / self.data.size)  # DeepSpeed averages over the ranks
        sum_partial(gradients_of(self.partial), self.tp)
        self.passes.sum_tied(gradients_by_name(self.named))
        self.gradients.reduce()
        self.engine.allreduce_gradients()
        return loss_sum

    def close(self) -> None:
        super().close()
        self.engine.destroy()


# ------------------------------------------------------------------------------------------------ stages 1 to 3


class Cast(nn.Module):
    """A model whose products are taken in another format. (DeepSpeed's engine switches an outer autocast off.)"""

    def __init__(self, model: nn.Module, passes: Passes):
        super().__init__()
        self.model, self.passes = model, passes

    def forward(self, batch: Batch) -> Any:
        with self.passes.number_format():
            return self.model(batch)


@dataclass(frozen=True)
class Fragment:
    """The part of a parameter whose optimiser state this rank holds: a flat range of the local tensor."""

    name: str
    start: int
    master: Tensor
    """float32 [n], a view into the flat partition `flat`."""
    flat: Tensor
    group: int
    """Number of `flat` among DeepSpeed's."""
    at: int
    """Where the range begins in `flat`."""


class ZeroEngine:
    """Stages 1, 2 and 3: optimiser state, gradients and parameters are partitioned over the data-parallel ranks."""

    def __init__(self, parts: Parts, choice: DeepSpeed):
        self.parts, self.model, self.device, self.stage = parts, parts.model, parts.device.torch, parts.zero
        mesh = connected(parts.mesh)
        self.data, self.tp, self.pp = (mesh.axis(name) for name in ("data", "tp", "pp"))
        self.named = dict(self.model.named_parameters())
        self.shards = shards(self.model)
        refuse(self.named)
        self.partial = [p for name, p in self.named.items() if self.shards[name].partial]
        self.bf16 = parts.precision.parameters == "bf16"
        exact = {name: p.detach().clone() for name, p in self.named.items()} if self.bf16 else {}
        self.once = self.stage == 1 or parts.pipeline is not None
        """Gradients are reduced once a step, not with every micro-batch."""
        bare = passes_of(parts, mesh)
        module = Cast(self.model, bare) if bare.autocast and parts.pipeline is None else self.model
        self.optimizer = parts.optimizer.build(self.named)
        if self.stage == 3:
            keep_compiled_blocks_whole(self.model, parts.device)
        numel = sum(p.numel() for p in self.named.values())
        config = zero_config(self.stage, self.bf16, choice.persistent_below, numel, once=self.once)
        self.engine = initialize(module, self.optimizer, mesh, parts.device, config)
        self.zero = self.engine.optimizer
        held = [Held(f.name, f.flat, self.shards[f.name], f.start, f.master.numel(), f.at) for f in self._fragments()]
        self.optimizer.settle(held, self.shards, mesh.axis("stage"))
        if self.once:
            for p in self.named.values():
                p.grad_dtype = torch.float32
        else:
            self._sum_partial_in_backward()
        # schedules call the stages themselves; else DeepSpeed's engine wants to be called
        self.passes = bare if parts.pipeline else Passes(self.engine, self.data, parts.micro_batch, self.device)
        if exact:
            self._start_from(exact)

    # --------------------------------------------------------------------------------- a step

    def step(self, batch: Batch, lr: float, most_loss: float = math.inf) -> StepReport:
        batch = batch.to(self.device)
        tokens = self.passes.global_tokens(batch)
        loss_sum = self._reduced_gradients_of(batch, tokens / self.data.size)  # DeepSpeed averages over the ranks
        squared, by_parameter = self._pieces().squares(self.device)
        norm = global_norm(squared, (self.data, self.tp, self.pp))
        loss = mean(summed(loss_sum, self.data), tokens)
        skipped = refused(norm, loss, most_loss)
        set_lr(self.optimizer, lr)
        with guarded(self.optimizer, clip_divisor(norm, self.parts.optimizer.clip), skipped):
            self.engine.step()
        return StepReport(loss, tokens, norm, skipped, by_parameter)

    def _reduced_gradients_of(self, batch: Batch, divisor: Tensor) -> Tensor:
        """Leave the reduced gradient in DeepSpeed's partitions; return this rank's loss sum."""
        if self.once:
            with self.engine.coalesce_grad_reduction():
                loss_sum = self.passes.forward_backward(batch, divisor)
                sum_partial(gradients_of(self.partial), self.tp)
                self.passes.sum_tied(gradients_by_name(self.named))
            return loss_sum

        def backward(loss: Tensor, last: bool) -> None:
            self.engine.set_gradient_accumulation_boundary(last)
            self.engine.backward(loss)

        return self.passes.forward_backward(batch, divisor, backward)

    def _sum_partial_in_backward(self) -> None:
        """Partial gradients must be summed over tp before DeepSpeed takes them away, which it does during backward."""

        def hook_of(shard: Shard) -> Callable[[Tensor], Tensor]:
            def sum_over_tp(gradient: Tensor) -> Tensor:
                total = gradient.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
                sum_partial([(shard, total.view(-1), 0)], self.tp)
                return total.to(gradient.dtype)

            return sum_over_tp

        for p in self.partial:
            if self.tp.size > 1:
                p.register_hook(hook_of(shard_of(p)))

    def _pieces(self) -> Pieces:
        """This rank's partition of the gradient: what it counts, and what another tensor-parallel rank counts."""
        found = {}
        for group, pieces in self.zero.averaged_gradients.items():  # laid end to end, they are the flat partition
            at = 0
            for piece in pieces:
                found[group, at] = piece
                at += piece.numel()
        pieces = Pieces()
        for held in self._fragments():
            flat = found[held.group, held.at].flatten()[: held.master.numel()]
            for piece in self.shards[held.name].boxes(held.start, flat.numel()):
                pieces.add(held.name, flat.narrow(0, piece.offset, piece.box.numel), piece.counted)
        return pieces

    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.passes.evaluate(batch)

    # --------------------------------------------------------------------------------- its state

    def _flats(self) -> list[Tensor]:
        """The flat float32 partitions, in the order of DeepSpeed's groups."""
        if self.stage == 3:
            return list(self.zero.fp32_partitioned_groups_flat)
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _fragments(self) -> Iterator[Fragment]:
        flats = self._flats()
        p: Any  # it has DeepSpeed's attributes
        for name, p in self.named.items():
            if self.stage == 3:
                group, at, _ = self.zero.grad_position[self.zero.get_param_id(p)]
                start = p.ds_tensor.ds_numel * self.data.rank
                numel = min(
                    p.ds_tensor.ds_numel, p.ds_numel - start
                )  # partitions are equal, so the last ends in padding
            elif p._hp_mapping is None:
                continue  # other ranks hold all of it
            else:  # its optim_fragment would be easier to use, but is filled for the first parameter group only
                mapping = p._hp_mapping
                group, at = mapping.param_group_index, mapping.hp_fragment_address.start
                start, numel = mapping.lp_fragment_address.start, mapping.hp_fragment_address.numel
            if numel > 0:
                yield Fragment(name, start, flats[group].data.narrow(0, at, numel), flats[group], group, at)

    def slices(self) -> Iterator[Slice]:
        yield from self._weights()
        yield from self.optimizer.slices()

    def _weights(self) -> Iterator[Slice]:
        for f in self._fragments():
            yield from slices_of("weights", f.name, self.shards[f.name], f.master, f.start)

    @torch.no_grad()
    def load(self, fill: Callable[[Slice], None], states: Callable[[str], bool] = lambda state: True) -> None:
        load(self._weights(), self.optimizer, fill, states)
        self._publish()

    @torch.no_grad()
    def _start_from(self, exact: dict[str, Tensor]) -> None:
        """Give the masters the values from before rounding: DeepSpeed makes them from the rounded ones."""
        for held in self._fragments():
            held.master.copy_(exact[held.name].flatten().narrow(0, held.start, held.master.numel()))
        self._publish()

    def _publish(self) -> None:
        """Make the model compute with the masters' values, on every rank."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        for low, high in zip(self.zero.fp16_partitioned_groups_flat, self._flats(), strict=True):
            low.data.copy_(high.data)
        if kept := self.zero.persistent_parameters:
            kept[0].partition(kept, has_been_updated=False)
            kept[0].all_gather(kept)

    def scalars(self) -> dict[str, Any]:
        return {"optimizer_steps": step_count(self.optimizer)}

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        set_step_count(self.optimizer, scalars["optimizer_steps"])

    def close(self) -> None:
        self.engine.destroy()


def refuse(named: dict[str, nn.Parameter]) -> None:
    """Raise ConfigError for what ZeRO cannot do right."""
    if frozen := [name for name, p in named.items() if not p.requires_grad]:
        raise ConfigError(
            f"parameters that are not trained ({', '.join(frozen[:3])}) have no place in DeepSpeed's partitions: "
            "set layout.engine=plain"
        )
