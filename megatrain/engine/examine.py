"""Extremes of activations, layer by layer, on a batch: what is looked at when a step went wrong."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from megatrain.nn.batch import Batch


def extremes(
    blocks: Mapping[str, nn.Module], evaluate: Callable[[Batch], tuple[Tensor, Tensor]], batch: Batch
) -> dict[str, float]:
    """Largest magnitude in the output of each block while `batch` is evaluated; NaN and infinities show as such."""
    found: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for name, block in blocks.items():
            stack.enter_context(_noting(name, block, found))
        evaluate(batch)
    return {name: float(x) for name, x in found.items()}


@contextlib.contextmanager
def _noting(name: str, block: nn.Module, found: dict[str, Tensor]) -> Iterator[None]:
    def note(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        largest = output.detach().abs().amax().float()
        found[name] = torch.maximum(found[name], largest) if name in found else largest

    handle = block.register_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()
