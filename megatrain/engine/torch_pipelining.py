"""torch.distributed.pipelining behind our own names: the only file that imports it.

It moves hidden states and gradients between ranks in the order of a schedule. What is in a micro-batch it never sees:
micro-batches are numbers to it, and a stage looks up the rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from megatrain.engine.schedules import PipelinePlan
from megatrain.parallel.mesh import Axis

Forward = Callable[[int, tuple[Tensor, ...]], Tensor]
"""(number of the micro-batch, (hidden states of the stage before,) or ()) -> hidden states, or the loss."""

Runner = Callable[[], None]


class _Stage(PipelineStage):
    def __init__(self, *args: Any, forward: Forward, **options: Any):
        super().__init__(*args, **options)
        self._forward = forward

    def forward_maybe_with_nosync(self, *received: Tensor, number: Tensor) -> Tensor:
        """torch calls this once for each micro-batch; the first stage is sent nothing but the number."""
        return self._forward(int(number), () if self.is_first else received)


@dataclass(frozen=True)
class LocalStage:
    """A stage of this rank, as the schedule is told of it."""

    number: int
    module: nn.Module
    """What an engine has wrapped: torch asks whether it is fully_shard's."""
    forward: Forward
    pay: Callable[[], Runner] | None
    """After a backward: what pays the weight gradients that it owes. None where they come with it."""


def build_schedule(
    plan: PipelinePlan,
    axis: Axis,
    stages: list[LocalStage],
    hidden: Tensor,
    device: torch.device,
    n_micro_batches: int,
    loss: Callable[[Tensor], Tensor],
) -> Callable[[], None]:
    """One step of the plan's schedule, forward and backward, on this rank.

    Args:
        hidden: a meta tensor of what crosses stages.
        loss: what the last stage's output is turned into before its backward.
    """
    numbers = torch.empty(1, dtype=torch.int64, device="meta")
    total = torch.empty((), device="meta", requires_grad=True)
    between = hidden.detach().requires_grad_()
    made = [
        _Stage(
            stage.module,
            stage.number,
            plan.n_stages,
            device,
            input_args=(numbers if stage.number == 0 else between,),
            output_args=(total if stage.number == plan.n_stages - 1 else between,),
            group=axis.group,
            dw_builder=stage.pay,
            forward=stage.forward,
        )
        for stage in stages
    ]
    kind: Any = get_schedule_class(plan.schedule.torch_name)
    local = made[0] if issubclass(kind, PipelineScheduleSingle) else made
    schedule = kind(local, n_micro_batches, loss_fn=lambda out, number: loss(out), scale_grads=False)
    holds_first, holds_last = made[0].is_first, made[-1].is_last

    def step() -> None:
        numbers = torch.arange(n_micro_batches)
        schedule.step(
            *((numbers,) if holds_first else ()),
            number=numbers,
            target=numbers if holds_last else None,
            return_outputs=False,
        )

    return step


# ------------------------------------------------------------------------------------------------ what a schedule does


@dataclass(frozen=True)
class Action:
    """One thing that a rank does in a step."""

    kind: str
    """F forward, I gradients of inputs, W of weights, B both."""
    stage: int
    micro_batch: int


KINDS = {"FORWARD": "F", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W", "FULL_BACKWARD": "B"}


def actions_of(plan: PipelinePlan, n_micro_batches: int) -> list[list[Action]]:
    """What each rank does in a step, in order: torch's own tables, built without any process group."""
    kind: Any = get_schedule_class(plan.schedule.torch_name)
    if issubclass(kind, PipelineScheduleSingle):
        return [_recorded(kind, rank, plan.pp, n_micro_batches) for rank in range(plan.pp)]
    stand_ins = [
        SimpleNamespace(stage_index=i, num_stages=plan.n_stages, group_size=plan.pp, group_rank=0, submod=None)
        for i in range(plan.virtual)
    ]
    table = kind(stand_ins, n_micro_batches, scale_grads=False).pipeline_order
    return [
        [
            Action(KINDS[part.computation_type.name], part.stage_index, part.microbatch_index)
            for action in table[rank]
            if action is not None
            for part in (action.sub_actions or (action,))
            if part.computation_type.name in KINDS
        ]
        for rank in range(plan.pp)
    ]


class _Recorder:
    """Stands in for a stage and writes down what a schedule asks of it; it neither sends nor receives."""

    def __init__(self, number: int, n_stages: int):
        self.stage_index, self.num_stages = number, n_stages
        self.is_first, self.is_last = number == 0, number == n_stages - 1
        self.actions: list[Action] = []

    def forward_one_chunk(self, micro_batch: int, *_: Any, **__: Any) -> None:
        self.actions.append(Action("F", self.stage_index, micro_batch))

    def backward_one_chunk(self, micro_batch: int, *_: Any, **__: Any) -> None:
        self.actions.append(Action("B", self.stage_index, micro_batch))

    def get_fwd_recv_ops(self, micro_batch: int) -> list[Any]:
        return []

    get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = get_fwd_recv_ops

    def perform_reduce_grad(self, factor: int) -> None: ...


def _recorded(kind: Any, rank: int, pp: int, n_micro_batches: int) -> list[Action]:
    """What a schedule of one stage a rank does. (torch keeps a table for these too, but does not go by it.)"""
    stage: Any = _Recorder(rank, pp)
    schedule = kind(stage, n_micro_batches, scale_grads=False)
    schedule._initialize_stage = lambda *_: None
    schedule._step_microbatches([()] * n_micro_batches, [{}] * n_micro_batches)
    return stage.actions
