"""What contract tests share: every example of a registry, tokens in packed rows, and one measure of closeness."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatrain.base.registry import Registry
from megatrain.nn.batch import Batch
from megatrain.nn.where import Where

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2}
"""Largest error against float64, as a share of the largest value: some tens of roundings of each format."""


def examples(registry: Registry[Any]) -> list[Any]:
    """Every example of every registered kind, as parameters of a test."""
    return [
        pytest.param(example, id=f"{kind}-{i}")
        for kind, cls in registry.items()
        for i, example in enumerate(cls.examples())
    ]


def error(found: Tensor, exact: Tensor, at_least: float = 1e-12) -> float:
    """Largest difference as a share of the largest value of `exact` (of `at_least`, where all are smaller)."""
    assert found.shape == exact.shape
    if not exact.numel():
        return 0.0
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).abs().max() / exact.abs().max().clamp(min=at_least))


def assert_near(
    found: Tensor, exact: Tensor, tolerance: float | None = None, what: str = "value", at_least: float = 1e-12
) -> None:
    tolerance = TOLERANCE[found.dtype] if tolerance is None else tolerance
    distance = error(found, exact, at_least)
    assert distance <= tolerance, f"{what} is off by {distance:.2e} of its largest value (allowed {tolerance:.0e})"


def assert_same_function(fast: Any, slow: Any, inputs: list[Tensor], tolerance: float | None = None) -> None:
    """fast(*inputs) equals slow(*inputs), which computes in float64, and so do the gradients of all inputs.

    `inputs` are leaves that need gradients; they may include the weights of a layer that both read.
    """
    y, exact = fast(*inputs), slow(*inputs)
    assert_near(y, exact, tolerance)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    found = torch.autograd.grad(y, inputs, cotangent)
    expected = torch.autograd.grad(exact, inputs, cotangent.to(exact.dtype))
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        lowest = TOLERANCE[min((y.dtype, a.dtype), key=lambda d: torch.finfo(d).bits)]
        # a gradient may be exactly 0: its error is then measured by the cotangent's ones
        assert_near(a, b, lowest if tolerance is None else tolerance, f"gradient {i}", at_least=1.0)


def leaf(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values that need a gradient."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def randomise(module: torch.nn.Module, seed: int = 7, std: float = 0.3) -> None:
    """Every parameter away from its start, since ones and zeros hide mistakes."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * std + (p.ndim == 1))


def rows(*documents: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Positions and document numbers of rows, each made of documents of these lengths."""
    positions = [torch.cat([torch.arange(n) for n in lengths]) for lengths in documents]
    numbers = [torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)).int() for n in documents]
    return torch.stack(positions), torch.stack(numbers)


def where(*documents: tuple[int, ...]) -> Where:
    return Where(*rows(*documents), most_documents=max(map(len, documents)))


def batch(*documents: tuple[int, ...], vocab_size: int, seed: int = 0, step: int = 0) -> Batch:
    """Random tokens in rows of these documents; some targets count more than others, and some not at all."""
    g = torch.Generator().manual_seed(seed)
    positions, numbers = rows(*documents)
    shape = positions.shape
    weights = torch.randint(0, 3, shape, generator=g).float() / 2
    return Batch(
        tokens=torch.randint(vocab_size, shape, generator=g),
        targets=torch.randint(vocab_size, shape, generator=g),
        weights=weights,
        positions=positions,
        documents=numbers,
        most_documents=max(map(len, documents)),
        step=step,
    )
