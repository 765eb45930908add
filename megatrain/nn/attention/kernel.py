"""The one place that names an attention kernel, and the slow twin of every attention kind."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatrain.parallel.product import by_float32


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(k)) v by torch's fused kernels (FlashAttention where the device and shape take it).

    Args:
        q: [b, h, t, k]. k, v: [b, g, s, k] with g dividing h (grouped queries, Ainslie et al. 2023, arXiv:2305.13245).
        mask: bool [b or 1, 1, t, s], True where a query sees a key; None with `causal` for the plain lower triangle.

    Returns:
        [b, h, t, k].
    """
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.device.type == "cpu":  # the fused CPU kernel takes equal head counts only
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        grouped = False
    options: dict[str, Any] = {"attn_mask": mask, "is_causal": causal and mask is None, "enable_gqa": grouped}
    if by_float32(q):
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options).bfloat16()
    return F.scaled_dot_product_attention(q, k, v, **options)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Equation 1 of Vaswani et al. 2017 (arXiv:1706.03762), written out in float64, with a mask [b, 1, t, s]."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("bhtk,bhsk->bhts", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhts,bhsk->bhtk", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)
