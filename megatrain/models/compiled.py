"""torch.compile for the blocks of a model."""

from collections.abc import Callable
from typing import Any

import torch

VARIANTS = 128
"""Times that one function may be compiled. torch stops after 8, which blocks pass: eval and training are two, and with
layers in eight bits each choice of those that the guard sends back to bf16 is one."""


def compiled(forward: Callable[..., Any], backend: str | Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of a block; equal blocks share what was compiled."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(VARIANTS, config.recompile_limit)
    return torch.compile(forward, fullgraph=True, backend=backend)
