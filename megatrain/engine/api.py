"""The seam between the loop and the engines."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatrain.base.device import Device
from megatrain.base.registry import Registry
from megatrain.engine.schedules import PipelinePlan, PipelineSchedule
from megatrain.nn.batch import Batch
from megatrain.nn.precision.fp8 import Fp8
from megatrain.nn.precision.int8 import Int8
from megatrain.optim.norm import ByParameter
from megatrain.parallel.mesh import Mesh
from megatrain.parallel.shard import Slice


@dataclass(frozen=True)
class StepReport:
    """What a step did. Tensors are scalars on the device: reading them waits for the step, so read them late."""

    loss: Tensor
    """Mean loss per target token over the whole global batch, nats."""
    tokens: Tensor
    """Sum of the target weights of the global batch."""
    grad_norm: Tensor
    """2-norm of the gradient of `loss` over all parameters, before clipping."""
    skipped: Tensor
    """1 if the gradient was not finite, or the loss too high, and nothing was changed; else 0."""
    by_parameter: ByParameter | None = None
    """Squares of the gradient that this rank counts, by parameter."""


FP16 = "; fp16 has too small a range for gradients without loss scaling, which is not offered: bf16 needs none"


@dataclass(frozen=True, kw_only=True)
class Precision:
    """In which number formats a run computes: the run file's `precision` section.

    With bf16 parameters the optimiser works on float32 masters. Gradients are accumulated and reduced in float32
    always.
    """

    compute: str = "fp32"
    """What matrix products take: fp32 or bf16."""
    parameters: str = "fp32"
    """How weights are kept between steps: fp32 or bf16."""
    stochastic_rounding: bool = False
    """Keep no float32 masters of bf16 parameters: steps are added to the bf16 numbers and rounded by chance."""
    fp8: Fp8 | None = None
    """Linear layers whose products take FP8."""
    int8: Int8 | None = None
    """Linear layers whose products take INT8."""

    def problems(self) -> list[str]:
        found = [
            f"{name}={getattr(self, name)}: it must be fp32 or bf16{FP16 if getattr(self, name) == 'fp16' else ''}"
            for name in ("compute", "parameters")
            if getattr(self, name) not in ("fp32", "bf16")
        ]
        if found:
            return found
        if self.parameters == "bf16" and self.compute == "fp32":
            found.append("parameters=bf16 cannot be computed with in fp32: set compute=bf16, or parameters=fp32")
        if self.stochastic_rounding and self.parameters == "fp32":
            found.append("stochastic_rounding is for parameters=bf16: fp32 ones lose nothing that it could keep")
        if self.fp8 is not None and self.int8 is not None:
            found.append("fp8 and int8 are both given: a layer's products take one of them, so leave one out")
        if self.eight_bits is not None and self.compute != "bf16":
            found.append("fp8 and int8 are compared with and fall back to bf16: set compute=bf16")
        return found

    @property
    def eight_bits(self) -> Fp8 | Int8 | None:
        """What some linear layers multiply by, if any."""
        return self.int8 if self.fp8 is None else self.fp8

    @property
    def masters(self) -> bool:
        """The optimiser works on float32 copies of the parameters."""
        return self.parameters == "bf16" and not self.stochastic_rounding

    @property
    def autocast(self) -> torch.dtype | None:
        """What products cast to, where that is not the format of the parameters."""
        return torch.bfloat16 if self.compute != self.parameters else None


@dataclass(frozen=True, kw_only=True)
class EngineCase:
    """What an engine would have to do, known before anything is built."""

    zero: int = 0
    """Stage of ZeRO: 1 shards optimiser state over data-parallel ranks, 2 also gradients, 3 also parameters."""
    pp: int = 1
    precision: Precision = field(default_factory=Precision)
    schedule: PipelineSchedule | None = None
    """Of the pipeline, where pp > 1."""
    tied: bool = False
    """The head is the embedding."""

    @property
    def tied_copies(self) -> bool:
        """Embedding and head are one parameter and stand on two ranks."""
        return self.tied and self.schedule is not None and self.schedule.placement == "loop"


class Model(Protocol):
    """What an engine drives: a module that turns a batch into a loss sum and a count."""

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum of weighted token losses in nats, sum of weights), both float32 scalars."""
        ...


class Engine(Protocol):
    """Trains one model. Every engine is made by `build(parts)` of its registered choice (see `ENGINE`).

    A choice also has `unsupported_reasons(case: EngineCase) -> list[str]`, which is asked before anything is built.
    """

    parts: "Parts"
    """What it was built from."""

    def step(self, batch: Batch, lr: float, most_loss: float = math.inf) -> StepReport:
        """One optimiser step on this rank's rows of a global batch, in micro-batches.

        Nothing is changed where a gradient is not finite or the loss is above `most_loss`, which is decided on the
        device.
        """
        ...

    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(loss sum, token count) of this rank's rows summed over all ranks; forward only, no state changes.

        All ranks bring equally many rows.
        """
        ...

    def slices(self) -> Iterator[Slice]:
        """The state this rank holds: weights and every optimiser tensor, as slices of full named tensors.

        Weights are the float32 ones that the optimiser works on. A tied parameter appears once. Over all ranks the
        counted slices hold every element exactly once.
        """
        ...

    def load(self, fill: Callable[[Slice], None], states: Callable[[str], bool] = lambda state: True) -> None:
        """Fill this rank's slices (of the wanted states) through `fill(slice)`, then make the model use them."""
        ...

    def scalars(self) -> dict[str, Any]:
        """State that is no tensor (the optimiser's step count), as JSON values."""
        ...

    def load_scalars(self, scalars: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Parts:
    """What an engine is built from. `optimizer` is a choice of megatrain.optim; it builds the torch optimiser."""

    model: nn.Module
    optimizer: Any
    mesh: Mesh
    device: Device
    precision: Precision
    micro_batch: int
    zero: int
    pipeline: PipelinePlan | None = None
    """With it the model is the `models.stages.Stages` of this rank."""


def no_masters(case: EngineCase, engine: str) -> list[str]:
    """Why an engine that keeps masters of its own cannot do without."""
    if not case.precision.stochastic_rounding:
        return []
    return [
        f"precision.stochastic_rounding works without float32 masters, which {engine} always keeps: set "
        "layout.engine=plain, or leave it out"
    ]


ENGINE: Registry[Any] = Registry("engine", "megatrain.engine.kinds")
