"""What all peers share: the shape, the weights to begin with, the tokens, and the usual loop around a model."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatrain.models.decoder import Decoder
from megatrain.nn.norm.rms_norm import RMSNorm
from megatrain.nn.position.rotary import Rotary
from megatrain.parallel.shard import initialise

EPS, THETA, LR, CLIP = 1e-5, 10_000.0, 1e-3, 1.0
BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.1


@dataclass(frozen=True)
class Step:
    """One optimiser step of a peer; a call takes it and gives its loss."""

    take: Callable[[], float]
    kept: Callable[[], Iterable[Tensor]] = tuple
    """Tensors that stay between steps: parameters, buffers, the optimiser's state."""

    def __call__(self) -> float:
        return self.take()


@dataclass(frozen=True)
class Shape:
    d_model: int = 256
    n_layers: int = 8
    n_heads: int = 8
    d_ff: int = 688
    vocab_size: int = 8192
    seq_len: int = 256
    batch: int = 8
    n_kv_heads: int | None = None
    """As many as n_heads by default."""
    micro_batches: int = 1
    """Times that a step takes the batch."""

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def widths(self) -> tuple[int, int, int]:
        """Of all heads of queries, keys and values."""
        return self.d_model, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.seq_len * self.micro_batches

    def rows(self) -> tuple[Tensor, Tensor]:
        """Tokens and targets, [batch, seq_len]: a Zipf-like stream, so that there is something to learn."""
        ranks = torch.arange(1, self.vocab_size + 1, dtype=torch.float64, device="cpu")
        g = torch.Generator("cpu").manual_seed(0)
        stream = torch.multinomial(1 / ranks, self.batch * (self.seq_len + 1), replacement=True, generator=g)
        rows = stream.view(self.batch, -1).to(torch.get_default_device())
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


SHAPES = {
    "cpu-tiny": Shape(),
    "gpu-0.5b": Shape(1280, 20, 20, 4608, 32_000, 4096, 8, 4),
    "gpu-1b": Shape(2048, 16, 32, 8192, 128_256, 4096, 4, 8),
    "gpu-8b-6l": Shape(4096, 6, 32, 14_336, 128_256, 4096, 2, 8),
}
"""As in `configs/bench`."""


def decoder(shape: Shape) -> nn.Module:
    s = shape
    choice = Decoder(
        d_model=s.d_model,
        n_layers=s.n_layers,
        n_heads=s.n_heads,
        n_kv_heads=s.kv_heads,
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
        rows = shape.widths if part == "to_qkv" else [len(tensor) // len(names)] * len(names)
        for piece, value in zip(names, tensor.split(rows), strict=True):
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


def by_hand(
    model: nn.Module, loss_of: Callable[[], Tensor], bf16: bool, micro_batches: int = 1, masters: bool = False
) -> Step:
    """The usual loop: backward, clip, fused AdamW; norm gains are not decayed.

    Args:
        bf16: under autocast.
        masters: for bf16 on a card, parameters and activations in bf16 and float32 masters in place of autocast, as
            trainers do that shard.
    """
    device = next(model.parameters()).device.type
    masters = masters and bf16 and device == "cuda"
    own = _Masters(model) if masters else list(model.parameters())
    matrices, gains = [p for p in own if p.ndim > 1], [p for p in own if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)

    def step() -> float:
        for _ in range(micro_batches):
            with torch.autocast(device, torch.bfloat16) if bf16 and not masters else contextlib.nullcontext():
                loss = loss_of()
            (loss / micro_batches if micro_batches > 1 else loss).backward()
        nn.utils.clip_grad_norm_(own, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if isinstance(own, _Masters):
            own.hand_out()
        return float(loss.detach())

    def kept() -> list[Tensor]:
        states = [value for state in optimizer.state.values() for value in state.values()]
        return [*model.parameters(), *model.buffers(), *own, *states]

    return Step(step, kept)


class _Masters(list[Tensor]):
    """Float32 copies of a model's parameters, which become bf16; a gradient moves over as soon as it is there."""

    def __init__(self, model: nn.Module):
        super().__init__(p.detach().clone() for p in model.parameters())
        self.parameters = list(model.parameters())
        for p, master in zip(self.parameters, self, strict=True):
            p.data = p.data.to(torch.bfloat16)
            p.register_post_accumulate_grad_hook(_Moved(master))

    def hand_out(self) -> None:
        """The masters' values to the parameters."""
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, list(self))


class _Moved:
    def __init__(self, master: Tensor):
        self.master = master

    def __call__(self, p: Tensor) -> None:
        assert p.grad is not None
        if self.master.grad is None:
            self.master.grad = p.grad.float()
        else:
            self.master.grad += p.grad
        p.grad = None
