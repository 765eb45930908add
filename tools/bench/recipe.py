"""What all peers share: the shape, the weights to begin with, the tokens, and the usual loop around a model."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatrain.models.decoder import Decoder
from megatrain.nn.norm.rms_norm import RMSNorm
from megatrain.nn.position.rotary import Rotary
from megatrain.parallel.shard import initialise

EPS, THETA, LR, CLIP = 1e-5, 10_000.0, 1e-3, 1.0
BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.1

Step = Callable[[], float]


@dataclass(frozen=True)
class Shape:
    d_model: int = 256
    n_layers: int = 8
    n_heads: int = 8
    d_ff: int = 688
    vocab_size: int = 8192
    seq_len: int = 256
    batch: int = 8

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.seq_len

    def rows(self) -> tuple[Tensor, Tensor]:
        """Tokens and targets, [batch, seq_len]: a Zipf-like stream, so that there is something to learn."""
        ranks = torch.arange(1, self.vocab_size + 1, dtype=torch.float64)
        g = torch.Generator().manual_seed(0)
        stream = torch.multinomial(1 / ranks, self.batch * (self.seq_len + 1), replacement=True, generator=g)
        rows = stream.view(self.batch, -1)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def decoder(shape: Shape) -> nn.Module:
    s = shape
    choice = Decoder(
        d_model=s.d_model,
        n_layers=s.n_layers,
        n_heads=s.n_heads,
        d_ff=s.d_ff,
        tie_embeddings=False,
        norm=RMSNorm(eps=EPS),
        position=Rotary(theta=THETA),
    )
    model = choice.build(n_valid=s.vocab_size, seq_len=s.seq_len)
    initialise(model, seed=0)
    return model


Table = Mapping[str, str]
"""Name of a part -> name of its weight in a library, with {i} for the number of the layer."""


def weights_of(shape: Shape) -> dict[tuple[str, int], Tensor]:
    """Our decoder's weights by part and layer: q, k, v, out, gate, up, down, the norms, and what is there once."""
    found = {}
    for name, tensor in decoder(shape).state_dict().items():
        words = name.split(".")
        if words[0] != "layers":
            found[words[0], 0] = tensor
            continue
        i, part = int(words[1]), words[-2]
        names = {"to_qkv": ("q", "k", "v"), "gate_up": ("gate", "up"), "to_out": ("out",)}.get(part, (part,))
        for piece, value in zip(names, tensor.chunk(len(names)), strict=True):
            found[piece, i] = value
    return found


def fill(model: nn.Module, weights: Mapping[tuple[str, int], Tensor], table: Table) -> None:
    """Give `model` these weights; all of its parameters must be among them."""
    named = {table[part].format(i=i): value for (part, i), value in weights.items() if part in table}
    parameters = dict(model.named_parameters())
    assert parameters.keys() == named.keys(), parameters.keys() ^ named.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(named[name])


def by_hand(model: nn.Module, loss_of: Callable[[], Tensor], bf16: bool) -> Step:
    """The usual loop: autocast, backward, clip, fused AdamW; norm gains are not decayed."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step
