"""The one place that names an attention kernel, and the slow twin of every attention kind."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from megatrain.nn.where import Borders
from megatrain.parallel.product import by_float32, product_format


def scaled_dot_product(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Borders | None, *, causal: bool, window: int | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(k)) v by torch's fused kernels (FlashAttention where the device and shape take it).

    Args:
        q: [b, h, t, k]. k, v: [b, g, s, k] with g dividing h (grouped queries, Ainslie et al. 2023, arXiv:2305.13245).
        mask: bool [b or 1, 1, t, s], True where a query sees a key; `Borders` for causal attention within documents;
            None with `causal` for the plain lower triangle.
        window: with `Borders`, how many keys a query sees; None: all before it. (A mask says so itself.)

    Returns:
        [b, h, t, k].
    """
    if isinstance(mask, Borders):
        return _by_documents(q, k, v, mask, window)
    if _short(q, k):
        return _ShortOnCPU.apply(*as_products(q, k, v), mask, causal)
    q, k, v, options = _as_taken(q, k, v, mask, causal)
    if by_float32(q):
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options).bfloat16()
    return F.scaled_dot_product_attention(q, k, v, **options)


def kernel_for(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool) -> str:
    """The name of the kernel that `scaled_dot_product` uses for such tensors, as torch chooses by card and shape."""
    q, k, v = as_products(q, k, v)
    q, k, v, options = _as_taken(q, k, v, mask, causal)
    return KERNELS[SDPBackend(torch._fused_sdp_choice(q, k, v, **options)).name]


def takes_borders(x: Tensor, head_dim: int) -> bool:
    """Attention for activations like `x` can go from document to document: on cards, in 16 bits, by FlashAttention."""
    return x.device.type == "cuda" and product_format(x).itemsize == 2 and head_dim % 8 == 0 and head_dim <= 256


def _by_documents(q: Tensor, k: Tensor, v: Tensor, borders: Borders, window: int | None) -> Tensor:
    """Causal attention within documents, at the cost of their own triangles (Dao 2023, arXiv:2307.08691)."""
    asked, rows = q.dtype, q.shape[0]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in as_products(q, k, v))  # [b t, heads, k]
    behind = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    starts, longest = borders.starts, borders.longest
    y, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, starts, starts, longest, longest, 0.0, True, False, **behind
    )
    return y.unflatten(0, (rows, -1)).transpose(1, 2).to(asked)


KERNELS = {
    "FLASH_ATTENTION": "FlashAttention",
    "CUDNN_ATTENTION": "cuDNN's fused attention",
    "EFFICIENT_ATTENTION": "memory-efficient attention",
    "MATH": "plain products and softmax",
    "OVERRIDEABLE": "the device's own attention",
}
"""torch's names of its kernels, for people."""


def _as_taken(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """What torch's function is called with."""
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.device.type == "cpu":  # the fused CPU kernel takes equal head counts only
        k, v = _every_head(k, q), _every_head(v, q)
        grouped = False
    return q, k, v, {"attn_mask": mask, "is_causal": causal and mask is None, "enable_gqa": grouped}


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Equation 1 of Vaswani et al. 2017 (arXiv:1706.03762), written out in float64, with a mask [b, 1, t, s]."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("bhtk,bhsk->bhts", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhts,bhsk->bhtk", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


# ------------------------------------------------------------------------------------------------ parts of a softmax


def as_products(*heads: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values in the number format that a kernel takes them in."""
    dtype = torch.float32 if by_float32(heads[0]) else product_format(heads[0])
    return tuple(x.to(dtype) for x in heads)


def attend_part(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention over some of the keys, with what is needed to merge it with attention over others.

    Args:
        q: [b, h, t, k]. k, v: [b, g, s, k] with g dividing h.
        mask: bool [b or 1, 1, t, s], True where a query sees a key; a row may see none of these keys. With None
            every query sees every key, or, with `causal`, the lower triangle.

    Returns:
        [b, h, t, k], and the logarithm of each query's sum of exponentials, float32 [b, h, t]: -inf where it sees none.
    """
    bias = None if mask is None else _bias(mask, q.dtype)
    k, v = _every_head(k, q), _every_head(v, q)
    if q.device.type == "cpu":
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        y, lse = op(q, k, v, 0.0, causal and mask is None, attn_mask=bias)
    elif _flash(q, mask):
        y, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False)
    else:
        op = torch.ops.aten._scaled_dot_product_efficient_attention
        y, lse, *_ = op(q, k, v, _expanded(bias, q), True, 0.0, causal and mask is None)
        lse = lse[..., : q.shape[2]]  # the kernel rounds the number of queries up
    if mask is not None:  # kernels disagree on what the empty sum is
        empty = ~mask.any(-1)
        lse, y = lse.masked_fill(empty, -torch.inf), y.masked_fill(empty[..., None], 0.0)
    return y, lse


def attend_part_backward(
    grad: Tensor, q: Tensor, y: Tensor, lse: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The share of some keys in the gradients of attention over all keys: of q, k and v.

    Args:
        grad: [b, h, t, k], of the whole output.
        y, lse: the output and the log-sum-exp over all keys, whichever part they come from.
    """
    groups = k.shape[1]
    bias = None if mask is None else _bias(mask, q.dtype)
    k, v = _every_head(k, q), _every_head(v, q)
    grad, y, lse = grad.contiguous(), y.contiguous(), lse.contiguous()
    if q.device.type == "cpu":
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        of_q, of_k, of_v = op(grad, q, k, v, y, lse, 0.0, causal and mask is None, attn_mask=bias)
    elif _flash(q, mask):
        op = torch.ops.aten._scaled_dot_product_flash_attention_backward
        t, s, no_seed = q.shape[2], k.shape[2], torch.zeros(2, dtype=torch.uint64, device=q.device)
        of_q, of_k, of_v = op(grad, q, k, v, y, lse, None, None, t, s, 0.0, causal, no_seed, no_seed[:0])
    else:
        op = torch.ops.aten._scaled_dot_product_efficient_attention_backward
        no_seed = torch.zeros((), dtype=torch.int64, device=q.device)
        lse = F.pad(lse, (0, -lse.shape[-1] % LSE_MULTIPLE), value=torch.inf)
        wanted = [True, True, True, False]
        of_q, of_k, of_v, _ = op(
            grad, q, k, v, _expanded(bias, q), y, lse, no_seed, no_seed, 0.0, wanted, causal and mask is None
        )
    return of_q, _summed_heads(of_k, groups), _summed_heads(of_v, groups)


def kernel_for_parts(q: Tensor, mask: Tensor | None) -> str:
    """The name of the kernel that `attend_part` uses."""
    (q,) = as_products(q)
    return KERNELS["FLASH_ATTENTION" if q.device.type == "cpu" or _flash(q, mask) else "EFFICIENT_ATTENTION"]


LSE_MULTIPLE, BIAS_MULTIPLE = 32, 16
"""The memory-efficient kernel wants the number of queries of a log-sum-exp, and of keys of a bias, in multiples."""


def _flash(q: Tensor, mask: Tensor | None) -> bool:
    """FlashAttention takes 16-bit numbers and no mask."""
    return mask is None and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a query sees a key, -inf elsewhere, in rows whose stride the kernels take."""
    s = mask.shape[-1]
    padded = torch.zeros((*mask.shape[:-1], s + -s % BIAS_MULTIPLE), dtype=dtype, device=mask.device)
    return padded[..., :s].masked_fill_(~mask, -torch.inf)


def _expanded(bias: Tensor | None, q: Tensor) -> Tensor | None:
    return None if bias is None else bias.expand(q.shape[0], q.shape[1], -1, -1)


def _every_head(x: Tensor, q: Tensor) -> Tensor:
    """One head of keys or values for each head of queries."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _summed_heads(grad: Tensor, groups: int) -> Tensor:
    """The gradient of `_every_head`."""
    return grad if grad.shape[1] == groups else grad.unflatten(1, (groups, -1)).sum(2)


# ------------------------------------------------------------------------------------------------ short rows on a CPU

SHORT = 256
"""Keys, up to which torch's gradient of attention takes a CPU longer in bf16 than in float32, by a half and more."""


def _short(q: Tensor, k: Tensor) -> bool:
    return (
        q.device.type == "cpu"
        and product_format(q) == torch.bfloat16
        and not by_float32(q)
        and 0 < q.shape[2] <= SHORT
        and 0 < k.shape[2] <= SHORT
    )


class _ShortOnCPU(torch.autograd.Function):
    """Forward in bf16, and bf16 is what it keeps; backward in float32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        y, lse = attend_part(q, k, v, mask, causal=causal)
        ctx.save_for_backward(q, k, v, mask, y, lse)
        ctx.causal = causal
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, y, lse = ctx.saved_tensors
        grad, q, k, v, y = (x.float() for x in (grads[0], q, k, v, y))
        found = attend_part_backward(grad, q, y, lse, k, v, mask, causal=ctx.causal)
        return *(x.bfloat16() for x in found), None, None
