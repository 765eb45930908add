"""NVIDIA apex's norms, where its CUDA extensions are installed."""

from typing import Any

import torch
from torch import Tensor

from megatrain.base.optional import nvidia_apex, optional


def apex_norms(x: Tensor) -> Any:
    """The module whose functions normalise `x`, or None where torch's do: on a CPU, without apex, and in compiled code,
    since the compiler makes one kernel of a norm and what stands beside it."""
    if not x.is_cuda or torch.compiler.is_compiling() or not nvidia_apex("fused_layer_norm_cuda"):
        return None
    return optional("apex.normalization.fused_layer_norm").module
