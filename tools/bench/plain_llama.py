"""A Llama as one would write it by hand in plain torch: what frameworks are measured against.

Fused products for query, key and value and for gate and up, torch's own norm and attention, all logits at once.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.to_qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.to_out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for y in self.to_qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(
            turned(q, cos, sin).to(v.dtype), turned(k, cos, sin).to(v.dtype), v, is_causal=True
        )
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
    def __init__(self, d_model: int, n_heads: int, d_ff: int, eps: float):
        super().__init__()
        self.attention_norm = nn.RMSNorm(d_model, eps)
        self.attention = Attention(d_model, n_heads)
        self.feed_forward_norm = nn.RMSNorm(d_model, eps)
        self.feed_forward = FeedForward(d_model, d_ff)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.feed_forward_norm(x))


class PlainLlama(nn.Module):
    """tokens and targets [b, t] -> mean cross-entropy. Names of parameters are those of our decoder."""

    def __init__(self, shape: Any, eps: float, theta: float):
        super().__init__()
        s = shape
        self.embedding = nn.Embedding(s.vocab_size, s.d_model)
        self.layers = nn.ModuleList(Block(s.d_model, s.n_heads, s.d_ff, eps) for _ in range(s.n_layers))
        self.norm = nn.RMSNorm(s.d_model, eps)
        self.head = nn.Linear(s.d_model, s.vocab_size, bias=False)
        head_dim = s.d_model // s.n_heads
        rates = theta ** -(torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.outer(torch.arange(s.seq_len), rates).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.layers:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
