"""What is measured: each peer trains the same shape from the same weights on the same tokens, with the same recipe.

A peer is a function that takes one optimiser step and returns its loss. Run as a program this serves one peer to
`lockstep`: it warms up, says so, and takes one step for each line it reads.
"""

import argparse
import ctypes
import gc
import json
import resource
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import libraries
import torch
import torch.nn.functional as F
from products import products
from recipe import BETAS, CLIP, EPS, LR, SHAPES, THETA, WEIGHT_DECAY, Shape, Step, by_hand, decoder, fill, weights_of

from megatrain.base.device import Device
from megatrain.engine.api import ENGINE, Parts, Precision
from megatrain.nn.batch import Batch
from megatrain.optim.kinds.adamw import AdamW
from megatrain.parallel.mesh import Mesh

# ------------------------------------------------------------------------------------------------ the peers


def megatrain(shape: Shape, bf16: bool, compiled: bool) -> Step:
    """The decoder under the plain engine, as `megatrain train` runs it on one rank."""
    device = Device(torch.get_default_device().type)
    device.use()
    model = decoder(shape)
    if compiled:
        model.compile_blocks()  # type: ignore[operator]
    optimizer = AdamW(lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, clip=CLIP)
    masters = bf16 and device.torch.type == "cuda"
    precision = Precision(compute="bf16" if bf16 else "fp32", parameters="bf16" if masters else "fp32")
    engine = ENGINE["plain"]().build(Parts(model, optimizer, Mesh(), device, precision, shape.batch, 0))
    tokens, targets = (rows.repeat(shape.micro_batches, 1) for rows in shape.rows())
    positions = torch.arange(shape.seq_len).expand_as(tokens)
    batch = Batch(
        tokens, targets, torch.ones(tokens.shape), positions, torch.zeros_like(tokens).int(), most_documents=1
    )

    def kept() -> list[torch.Tensor]:
        return [*model.parameters(), *model.buffers(), *(part.values for part in engine.slices())]

    return Step(lambda: float(engine.step(batch, LR).loss), kept)


def plain(shape: Shape, bf16: bool, compiled: bool) -> Step:
    from plain_llama import PlainLlama

    model = PlainLlama(shape, EPS, THETA)
    model.load_state_dict(decoder(shape).state_dict())
    tokens, targets = shape.rows()
    loss = torch.compile(model) if compiled else model
    return by_hand(model, lambda: loss(tokens, targets), bf16, shape.micro_batches)


def transformers(shape: Shape, bf16: bool, compiled: bool) -> Step:
    from transformers import LlamaConfig, LlamaForCausalLM

    s = shape
    config = LlamaConfig(
        hidden_size=s.d_model,
        intermediate_size=s.d_ff,
        num_hidden_layers=s.n_layers,
        num_attention_heads=s.n_heads,
        num_key_value_heads=s.kv_heads,
        vocab_size=s.vocab_size,
        max_position_embeddings=s.seq_len,
        rms_norm_eps=EPS,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).train()
    fill(
        model,
        weights_of(s),
        {
            "embedding": "model.embed_tokens.weight",
            "q": "model.layers.{i}.self_attn.q_proj.weight",
            "k": "model.layers.{i}.self_attn.k_proj.weight",
            "v": "model.layers.{i}.self_attn.v_proj.weight",
            "out": "model.layers.{i}.self_attn.o_proj.weight",
            "gate": "model.layers.{i}.mlp.gate_proj.weight",
            "up": "model.layers.{i}.mlp.up_proj.weight",
            "down": "model.layers.{i}.mlp.down_proj.weight",
            "attention_norm": "model.layers.{i}.input_layernorm.weight",
            "feed_forward_norm": "model.layers.{i}.post_attention_layernorm.weight",
            "norm": "model.norm.weight",
            "head": "lm_head.weight",
        },
    )
    tokens, targets = shape.rows()
    run = torch.compile(model) if compiled else model
    return by_hand(
        model, lambda: run(input_ids=tokens, labels=targets, shift_labels=targets).loss, bf16, s.micro_batches
    )


BOUND = "products"
"""No trainer: what its matrix products and attention alone would cost."""

PEERS: dict[str, Callable[[Shape, bool, bool], Step]] = {
    "megatrain": megatrain,
    "plain": plain,
    "transformers": transformers,
    "torchtitan": libraries.torchtitan,
    "litgpt": libraries.litgpt,
    "olmo-core": libraries.olmo_core,
    "megatron-core": libraries.megatron_core,
    BOUND: products,
}
NEEDS = {
    "transformers": "transformers",
    "torchtitan": "torchtitan",
    "litgpt": "litgpt",
    "olmo-core": "olmo_core",
    "megatron-core": "megatron",
}
"""The module that a peer is made with, where it is another than torch."""


def installed() -> list[str]:
    """Names of the peers whose library is here."""
    return [name for name in PEERS if find_spec(NEEDS.get(name, "torch"))]


# ------------------------------------------------------------------------------------------------ one process


def serve(peer: str, shape: Shape, device: str, precision: str, compiled: bool, threads: int, warmup: int) -> None:
    """Take a step for each line of standard input and answer with its cost, as JSON lines."""
    torch.set_num_threads(threads)
    if peer == "transformers":
        import transformers as _  # what importing costs is no peer's training memory
    F.silu(torch.ones(1))
    before = resident(device)
    with torch.device(device):
        step = PEERS[peer](shape, precision == "bf16", compiled)
    losses = [step() for _ in range(warmup)]
    forget_warming_up(device)
    print(json.dumps({"ready": True, "losses": losses}), flush=True)
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        loss = step()
        answer = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "loss": loss}
        print(json.dumps(answer | {"peak_bytes": most_memory(device) - before}), flush=True)


def forget_warming_up(device: str) -> None:
    """Give back what compiling left over, and let `most_memory` begin anew: what training takes is compared."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak is what is resident now


def most_memory(device: str) -> int:
    """Bytes that this process had at most: on a card those of its tensors."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def resident(device: str) -> int:
    """Bytes of this process that are in memory now."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=sorted(PEERS))
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--shape", choices=SHAPES, default="cpu-tiny")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=2)
    a = parser.parse_args()
    serve(a.peer, SHAPES[a.shape], a.device, a.precision, a.compile, a.threads, a.warmup)
