"""torch.compile for the parts of a model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

VARIANTS = 128
"""Times that one function may be compiled. torch stops after 8, which blocks pass: eval and training are two, and with
layers in eight bits each choice of those that the guard sends back to bf16 is one."""


def compiled(part: nn.Module, backend: str | Callable[..., Any]) -> Callable[..., Any]:
    """The forward of `part`; equal parts share what was compiled.

    A graph may be compiled at any time: the last micro-batch of a step may have fewer rows. Float32 gradients of bf16
    weights are there then, which torch's compiler refuses to see (gb0181), so they are put aside while it may look.
    """
    config: Any = torch._dynamo.config
    config.recompile_limit = max(VARIANTS, config.recompile_limit)
    run = torch.compile(part.forward, fullgraph=True, backend=backend)

    def forward(*args: Any) -> Any:
        aside = [(p, g) for p in part.parameters() if (g := p.grad) is not None and g.dtype != p.dtype]
        for p, _ in aside:
            p.grad = None
        try:
            return run(*args)
        finally:
            for p, gradient in aside:
                p.grad = gradient

    return forward
