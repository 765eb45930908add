"""A Llama as one would write it by hand in plain torch: what frameworks are measured against.

Fused products for query, key and value and for gate and up, torch's own norm and attention, all logits at once.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, d_model: int, head_dim: int, widths: tuple[int, int, int]):
        super().__init__()
        self.head_dim, self.widths = head_dim, widths
        self.to_qkv = nn.Linear(d_model, sum(widths), bias=False)
        self.to_out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = (y.unflatten(-1, (-1, self.head_dim)) for y in self.to_qkv(x).split(self.widths, -1))
        q, k, v = (y.transpose(1, 2) for y in heads)
        q, k = turned(q, cos, sin).to(v.dtype), turned(k, cos, sin).to(v.dtype)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])
        return self.to_out(y.transpose(1, 2).flatten(2))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class FeedForward(nn.Module):
    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, shape: Any, eps: float):
        super().__init__()
        s = shape
        self.attention_norm = nn.RMSNorm(s.d_model, eps)
        self.attention = Attention(s.d_model, s.head_dim, s.widths)
        self.feed_forward_norm = nn.RMSNorm(s.d_model, eps)
        self.feed_forward = FeedForward(s.d_model, s.d_ff)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.feed_forward_norm(x))


class PlainLlama(nn.Module):
    """tokens and targets [b, t] -> mean cross-entropy. Names of parameters are those of our decoder."""

    def __init__(self, shape: Any, eps: float, theta: float):
        super().__init__()
        s = shape
        self.embedding = nn.Embedding(s.vocab_size, s.d_model)
        self.layers = nn.ModuleList(Block(s, eps) for _ in range(s.n_layers))
        self.norm = nn.RMSNorm(s.d_model, eps)
        self.head = nn.Linear(s.d_model, s.vocab_size, bias=False)
        rates = theta ** -(torch.arange(0, s.head_dim, 2) / s.head_dim)
        angles = torch.outer(torch.arange(s.seq_len), rates).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.layers:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
