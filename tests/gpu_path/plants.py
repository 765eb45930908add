"""Faults of the kinds that slow or break a training step on a GPU, planted one at a time into a real step.

Each takes the trainer and runs one step with the fault in it. A test demands that each is found, at its line here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Plant = Callable[[Any], None]
PLANTS: dict[str, Plant] = {}


def after_first_block(fault: Callable[[Tensor], Tensor | None]) -> Plant:
    """Run `fault` on the hidden states [b, t, d] that the first block gives."""

    def plant(trainer: Any) -> None:
        block = next(iter(trainer.engine.model.layers.values()))
        handle = block.register_forward_hook(lambda module, inputs, output: fault(output))
        try:
            trainer.step()
        finally:
            handle.remove()

    PLANTS[fault.__name__] = plant
    return plant


def around_step(fault: Plant) -> Plant:
    PLANTS[fault.__name__] = fault
    return fault


@after_first_block
def mask_on_cpu(x: Tensor) -> Tensor:
    return x.masked_fill(torch.ones(x.shape[1], 1, dtype=torch.bool), 0)


@after_first_block
def index_on_cpu(x: Tensor) -> Tensor:
    return x[:, torch.arange(x.shape[1])]


@after_first_block
def item(x: Tensor) -> None:
    x.sum().item()


@after_first_block
def float_of_tensor(x: Tensor) -> None:
    float(x.sum())


@after_first_block
def branch_on_value(x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x


@after_first_block
def list_of_values(x: Tensor) -> None:
    x.sum(-1)[0].tolist()


@after_first_block
def nonzero(x: Tensor) -> None:
    (x > 0).nonzero()


@after_first_block
def read_through_mask(x: Tensor) -> None:
    x[x[..., 0] > 0]


@after_first_block
def write_through_mask(x: Tensor) -> Tensor:
    x = x.clone()
    x[x[..., 0] > 0] = torch.zeros(3, x.shape[-1], dtype=x.dtype, device=x.device)
    return x


@after_first_block
def copy_to_cpu(x: Tensor) -> None:
    x.cpu()


@after_first_block
def constant_from_python(x: Tensor) -> Tensor:
    return x * torch.tensor([2.0], device=x.device, dtype=x.dtype)


@after_first_block
def product_in_float32(x: Tensor) -> Tensor:
    wide = x.float()
    return x + 0 * (wide @ torch.ones(x.shape[-1], x.shape[-1], device=x.device)).to(x.dtype)


@after_first_block
def synchronize_device(x: Tensor) -> None:
    torch.accelerator.synchronize()


@after_first_block
def synchronize_stream(x: Tensor) -> None:
    torch.accelerator.current_stream().synchronize()


@around_step
def batch_not_pinned(trainer: Any) -> None:
    pinned = torch.Tensor.pin_memory
    torch.Tensor.pin_memory = lambda self: self  # type: ignore[method-assign, assignment]
    try:
        trainer.step()
    finally:
        torch.Tensor.pin_memory = pinned  # type: ignore[method-assign]


@around_step
def clip_that_looks(trainer: Any) -> None:
    engine = trainer.engine
    gradients_of = engine._gradients_of

    def and_look(*args: Any) -> Tensor:
        total = gradients_of(*args)
        torch.nn.utils.clip_grad_norm_(engine.named.values(), 1.0, error_if_nonfinite=True)
        return total

    engine._gradients_of = and_look
    try:
        trainer.step()
    finally:
        engine._gradients_of = gradients_of


@around_step
def numbers_read_at_once(trainer: Any) -> None:
    step = trainer.engine.step

    def and_read(*args: Any) -> Any:
        report = step(*args)
        float(report.loss)
        return report

    trainer.engine.step = and_read
    try:
        trainer.step()
    finally:
        trainer.engine.step = step
