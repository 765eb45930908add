"""Which kernels a run's layers and optimiser use on its device, and why: printed when it starts and kept with it."""

from typing import Any

import torch

from megatrain.base.device import Device
from megatrain.base.optional import nvidia_apex
from megatrain.nn.attention.kernel import KERNELS, kernel_for, kernel_for_parts, takes_borders
from megatrain.optim.kinds.adamw import AdamW
from megatrain.train.config import Run

TOKENS = 1024
"""The choice does not change beyond so many, and a mask of all tokens could be large."""


def kernel_table(run: Run, device: Device) -> dict[str, str]:
    """A line for each kind of kernel that there is a choice of."""
    table = {"attention": attention_kernel(run, device)}
    if device.kind == "cuda":
        table["norms"] = "the compiler" if run.layout.compiles(device.kind) else by_apex("fused_layer_norm_cuda")
        if type(run.optimizer) is AdamW:  # those made from it have another step
            table["optimiser step"] = by_apex("amp_C", "megatrain's Triton kernel")
    return table


def by_apex(extension: str, otherwise: str = "torch") -> str:
    found = nvidia_apex(extension)
    return "NVIDIA apex" if found else f"{otherwise}, not NVIDIA apex: {found.why_not}"


def attention_kernel(run: Run, device: Device) -> str:
    """The kernel of rows as the run packs them, and what kept a faster one away."""
    model: Any = run.model
    tokens, ranks = min(run.data.seq_len, TOKENS), run.layout.tp
    ring = run.layout.cp > 1 and run.layout.cp_kind == "ring"
    if not ring:
        ranks *= run.layout.cp
    dtype = torch.bfloat16 if run.precision.compute == "bf16" else torch.float32

    def heads(n: int) -> torch.Tensor:
        return torch.empty(1, max(1, n // ranks), tokens, model.width_of_head, dtype=dtype, device=device.torch)

    q, k = heads(model.n_heads), heads(model.kv_heads)
    plain, mask = model.attention.plain(run.data.mask_documents, run.data.seq_len), None
    with torch.autocast(device.kind, torch.bfloat16, enabled=dtype == torch.bfloat16):
        if not plain and not ring and takes_borders(q, model.width_of_head):
            return f"{KERNELS['FLASH_ATTENTION']}, from document to document"
        if not plain:
            mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=device.torch)
        name = kernel_for_parts(q, mask) if ring else kernel_for(q, k, k, mask, causal=True)
    return name if mask is None else f"{name} with a mask, since {why_masked(run)}"


def why_masked(run: Run) -> str:
    attention: Any = run.model.attention
    if not attention.plain(False, run.data.seq_len):
        return f"{attention.kind} attention does not see all that precedes"
    return "documents of one row do not see each other (data.mask_documents)"
