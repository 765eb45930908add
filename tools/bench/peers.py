"""What is measured: each peer trains the same shape from the same weights on the same tokens, with the same recipe.

A peer is a function that takes one optimiser step and returns its loss. Run as a program this serves one peer to
`lockstep`: it warms up, says so, and takes one step for each line it reads.
"""

import argparse
import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.base.device import Device
from megatrain.engine.api import ENGINE, Parts, Precision
from megatrain.models.decoder import Decoder
from megatrain.nn.batch import Batch
from megatrain.nn.norm.rms_norm import RMSNorm
from megatrain.nn.position.rotary import Rotary
from megatrain.optim.kinds.adamw import AdamW
from megatrain.parallel.mesh import Mesh
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


# ------------------------------------------------------------------------------------------------ the peers


def megatrain(shape: Shape, bf16: bool, compiled: bool) -> Step:
    """The decoder under the plain engine, as `megatrain train` runs it on one rank."""
    model = decoder(shape)
    if compiled:
        model.compile_blocks()  # type: ignore[operator]
    optimizer = AdamW(lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, clip=CLIP)
    precision = Precision(compute="bf16" if bf16 else "fp32")
    engine = ENGINE["plain"]().build(Parts(model, optimizer, Mesh(), Device("cpu"), precision, shape.batch, 0))
    tokens, targets = shape.rows()
    positions = torch.arange(shape.seq_len).expand_as(tokens)
    batch = Batch(tokens, targets, torch.ones(tokens.shape), positions, torch.zeros_like(tokens).int(), packed=False)
    return lambda: float(engine.step(batch, LR).loss)


def plain(shape: Shape, bf16: bool, compiled: bool) -> Step:
    from plain_llama import PlainLlama

    model = PlainLlama(shape, EPS, THETA)
    model.load_state_dict(decoder(shape).state_dict())
    tokens, targets = shape.rows()
    loss = torch.compile(model) if compiled else model
    return by_hand(model, lambda: loss(tokens, targets), bf16)


def transformers(shape: Shape, bf16: bool, compiled: bool) -> Step:
    from transformers import LlamaConfig, LlamaForCausalLM

    s = shape
    config = LlamaConfig(
        hidden_size=s.d_model,
        intermediate_size=s.d_ff,
        num_hidden_layers=s.n_layers,
        num_attention_heads=s.n_heads,
        vocab_size=s.vocab_size,
        max_position_embeddings=s.seq_len,
        rms_norm_eps=EPS,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).train()
    model.load_state_dict(renamed(decoder(shape).state_dict()))
    tokens, targets = shape.rows()
    run = torch.compile(model) if compiled else model
    return by_hand(model, lambda: run(input_ids=tokens, labels=targets, shift_labels=targets).loss, bf16)


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our decoder's weights under the names of transformers' Llama."""
    plain = {
        "attention_norm": "input_layernorm",
        "feed_forward_norm": "post_attention_layernorm",
        "attention.to_out": "self_attn.o_proj",
        "feed_forward.down": "mlp.down_proj",
    }
    ends = {
        "embedding.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    found = {}
    for name, tensor in weights.items():
        if name in ends:
            found[ends[name]] = tensor
            continue
        _, i, *middle, _ = name.split(".")
        part = ".".join(middle)
        if part == "attention.to_qkv":
            pieces = {f"self_attn.{k}_proj": piece for k, piece in zip("qkv", tensor.chunk(3), strict=True)}
        elif part == "feed_forward.gate_up":
            pieces = {f"mlp.{k}_proj": piece for k, piece in zip(("gate", "up"), tensor.chunk(2), strict=True)}
        else:
            pieces = {plain[part]: tensor}
        found |= {f"model.layers.{i}.{key}.weight": piece for key, piece in pieces.items()}
    return found


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


PEERS: dict[str, Callable[[Shape, bool, bool], Step]] = {f.__name__: f for f in (megatrain, plain, transformers)}


# ------------------------------------------------------------------------------------------------ one process


def serve(peer: str, shape: Shape, precision: str, compiled: bool, threads: int, warmup: int) -> None:
    """Take a step for each line of standard input and answer with its cost, as JSON lines."""
    torch.set_num_threads(threads)
    if peer == "transformers":
        import transformers as _  # what importing costs is no peer's training memory
    F.silu(torch.ones(1))
    before = resident()
    step = PEERS[peer](shape, precision == "bf16", compiled)
    losses = [step() for _ in range(warmup)]
    print(json.dumps({"ready": True, "losses": losses}), flush=True)
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        loss = step()
        answer = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "loss": loss}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(answer | {"peak_bytes": peak - before}), flush=True)


def resident() -> int:
    """Bytes of this process that are in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=sorted(PEERS))
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch", type=int, default=Shape.batch)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=2)
    a = parser.parse_args()
    serve(a.peer, Shape(batch=a.batch), a.precision, a.compile, a.threads, a.warmup)
