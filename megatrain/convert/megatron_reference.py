"""What a checkpoint of Megatron-LM computes, written out plainly: the other side of its conversion's proof.

Each tensor-parallel rank's tensors are used as that rank uses them, and partial results are added as its collectives
do, so that a mistake in putting ranks together shows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Rank = Mapping[str, Tensor]


@dataclass(frozen=True)
class Reference:
    """Logits in float32.

    Args:
        ranks: the tensors of each tensor-parallel rank.
        arguments: the command line of the training, by name.
        rates: radians a token by which each pair of channels turns, float64; None where none does.
        approximate: of GELU, as torch calls it.
    """

    ranks: Sequence[Rank]
    arguments: Mapping[str, Any]
    rates: Tensor | None
    approximate: str

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """tokens [b, t] -> [b, t, v]."""
        x = torch.stack([self._looked_up(rank, tokens, r) for r, rank in enumerate(self.ranks)]).sum(0)
        one = self.ranks[0]
        if "embedding.position_embeddings.weight" in one:
            x = x + one["embedding.position_embeddings.weight"][: tokens.shape[1]].float()
        for layer in range(self.arguments["num_layers"]):
            at = f"decoder.layers.{layer}"
            h = self._norm(x, f"{at}.self_attention.linear_qkv.layer_norm_")
            attended = [self._attended(rank, at, h) for rank in self.ranks]
            x = x + self._summed(attended, f"{at}.self_attention.linear_proj")
            h = self._norm(x, f"{at}.mlp.linear_fc1.layer_norm_")
            x = x + self._summed([self._fed(rank, at, h) for rank in self.ranks], f"{at}.mlp.linear_fc2")
        x = self._norm(x, "decoder.final_layernorm.")
        head = "output_layer.weight" if "output_layer.weight" in one else "embedding.word_embeddings.weight"
        return torch.cat([x @ rank[head].float().T for rank in self.ranks], -1)

    def _looked_up(self, rank: Rank, tokens: Tensor, number: int) -> Tensor:
        """Rows of this rank's part of the vocabulary, zeros for other tokens."""
        rows = rank["embedding.word_embeddings.weight"].float()
        own = tokens - number * len(rows)
        here = (own >= 0) & (own < len(rows))
        return rows[own.clamp(0, len(rows) - 1)] * here[..., None]

    def _norm(self, x: Tensor, prefix: str) -> Tensor:
        weight, bias = (self.ranks[0].get(prefix + kind) for kind in ("weight", "bias"))
        assert weight is not None
        gain = weight.float() + (1 if self.arguments.get("apply_layernorm_1p") else 0)
        eps = self.arguments.get("norm_epsilon", self.arguments.get("layernorm_epsilon", 1e-5))
        if self.arguments.get("normalization") == "RMSNorm":
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain
        return F.layer_norm(x, x.shape[-1:], gain, None if bias is None else bias.float(), eps)

    def _linear(self, rank: Rank, name: str, x: Tensor) -> Tensor:
        bias = rank.get(f"{name}.bias")
        return F.linear(x, rank[f"{name}.weight"].float(), None if bias is None else bias.float())

    def _summed(self, parts: list[Tensor], name: str) -> Tensor:
        bias = self.ranks[0].get(f"{name}.bias")
        total = torch.stack(parts).sum(0)
        return total if bias is None else total + bias.float()

    def _attended(self, rank: Rank, at: str, h: Tensor) -> Tensor:
        """This rank's heads: group by group its queries, a key and a value."""
        b, t, _ = h.shape
        width = self.arguments["kv_channels"]
        mixed = self._linear(rank, f"{at}.self_attention.linear_qkv", h)
        each = self.arguments["num_attention_heads"] // groups_of(self.arguments)
        mixed = mixed.view(b, t, -1, each + 2, width)
        q, k, v = mixed[..., :-2, :], mixed[..., -2:-1, :], mixed[..., -1:, :]
        if f"{at}.self_attention.q_layernorm.weight" in rank:
            q = self._norm(q, f"{at}.self_attention.q_layernorm.")
            k = self._norm(k, f"{at}.self_attention.k_layernorm.")
        q, k = self._turned(q), self._turned(k)
        scores = torch.einsum("btgek,bsgik->bgets", q, k) / width**0.5
        future = torch.ones(t, t, dtype=torch.bool).triu(1)
        shares = scores.masked_fill(future, -torch.inf).softmax(-1)
        y = torch.einsum("bgets,bsgik->btgek", shares, v).flatten(2)
        return y @ rank[f"{at}.self_attention.linear_proj.weight"].float().T

    def _turned(self, x: Tensor) -> Tensor:
        """[b, t, g, e, k] with its first channels turned by position."""
        if self.rates is None:
            return x
        half = len(self.rates)
        angles = (torch.arange(x.shape[1], dtype=torch.float64)[:, None] * self.rates)[None, :, None, None]
        cos, sin = angles.cos().float(), angles.sin().float()
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def _fed(self, rank: Rank, at: str, h: Tensor) -> Tensor:
        y = self._linear(rank, f"{at}.mlp.linear_fc1", h)
        if self.arguments.get("swiglu"):
            gate, up = y.chunk(2, -1)
            y = F.silu(gate) * up
        else:
            y = F.gelu(y, approximate=self.approximate)
        return y @ rank[f"{at}.mlp.linear_fc2.weight"].float().T


def groups_of(arguments: Mapping[str, Any]) -> int:
    """Heads of keys and values."""
    if arguments.get("group_query_attention"):
        return arguments["num_query_groups"]
    return arguments["num_attention_heads"]
