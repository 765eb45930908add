"""Training speed on one card: tokens a second, both MFUs, peak memory, and where the time goes.

    python tools/bench/gpu.py configs/bench/gpu-1b.yaml --json tools/bench/results/gpu-1b-h100.jsonl
    python tools/bench/gpu.py configs/bench/gpu-1b.yaml layout.recompute=none --steps 40

Batches are made up, so that nothing but the step is measured; the first steps, which compile and allocate, are left
out. Every line says the device, versions and commit that it was measured with.
"""

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
from collections import defaultdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megatrain.base.device import Device
from megatrain.data.manifest import TokenizerEntry
from megatrain.nn.batch import Batch
from megatrain.parallel.mesh import Mesh
from megatrain.train.build import build_engine
from megatrain.train.config import Run, read_run

WARM_UP = 10

PARTS = {
    "attention": ("flash", "fmha", "cudnn", "attention"),
    "products": ("gemm", "cutlass", "nvjet", "cublas", "wgmma", "splitk"),
    "loss": ("softmax", "both_kernel", "statistics_kernel"),
    "optimiser": ("multi_tensor", "adam"),
    "elementwise": ("triton",),
}
"""Part of the step -> what the names of its kernels contain; the first that fits counts."""


def batch_of(run: Run, vocab: int, device: Device) -> Batch:
    """One global batch of random tokens, each row one document."""
    shape = (run.train.global_batch, run.data.seq_len)
    tokens = torch.randint(0, vocab, shape)
    batch = Batch(
        tokens=tokens,
        targets=tokens.roll(-1, 1),
        weights=torch.ones(shape),
        positions=torch.arange(shape[1]).expand(shape).contiguous(),
        documents=torch.zeros(shape, dtype=torch.int32),
        most_documents=1,
    )
    return batch.to(device.torch)


def seconds_of_steps(engine: Any, batch: Batch, lr: float, n: int) -> list[float]:
    """Seconds of each of `n` steps, between events on the card."""
    events = [torch.Event(device=batch.tokens.device, enable_timing=True) for _ in range(n + 1)]
    events[0].record()
    for event in events[1:]:
        engine.step(batch, lr)
        event.record()
    events[-1].synchronize()
    return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(events)]


def parts_of_step(engine: Any, batch: Batch, lr: float) -> dict[str, float]:
    """Milliseconds of one step on the card by part."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        engine.step(batch, lr)
        torch.accelerator.synchronize()
    parts: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if event.self_device_time_total:
            name = event.key.lower()
            part = next((p for p, words in PARTS.items() if any(w in name for w in words)), "other")
            parts[part] += event.self_device_time_total / 1000
    return {part: round(ms, 3) for part, ms in sorted(parts.items(), key=lambda p: -p[1])}


def measure(run: Run, vocab: int, device: Device, steps: int) -> dict[str, Any]:
    engine = build_engine(run, TokenizerEntry("none", vocab, 0), Mesh.of().at(0), device)
    batch = batch_of(run, vocab, device)
    lr = run.optimizer.lr
    seconds_of_steps(engine, batch, lr, WARM_UP)
    seconds = seconds_of_steps(engine, batch, lr, steps)
    tokens = batch.tokens.numel()
    low, median, high = statistics.quantiles(seconds, n=4)
    flops = run.model.flops_per_token(vocab, run.data.seq_len)
    peak, source = device.peak_flops(torch.bfloat16)
    return {
        "tokens_per_second": round(tokens / median),
        "tokens_per_second_quartiles": [round(tokens / high), round(tokens / low)],
        "mfu": round(flops.causal * tokens / median / peak, 4),
        "mfu_palm": round(flops.palm * tokens / median / peak, 4),
        "model_flops_per_token": {"causal": flops.causal, "palm": flops.palm},
        "peak_flops": peak,
        "peak_source": source,
        "memory_gib": round(device.memory_bytes() / 2**30, 2),
        "step_ms": round(1000 * median, 2),
        "steps": steps,
        "parts_ms": parts_of_step(engine, batch, lr),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", type=Path, help="add the line to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA card here: run this on a machine with one")
    run = read_run(args.run, args.overrides).run
    vocab = run.model.vocab_size
    if vocab is None:
        sys.exit(f"{args.run} names no model.vocab_size, and there is no data to take it from: give one")
    device = Device.of("cuda")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    line = {
        "run": args.run,
        "overrides": args.overrides,
        "device": device.name(),
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "triton")},
        **measure(run, vocab, device, args.steps),
    }
    print(json.dumps(line, indent=2))
    if args.json:
        with args.json.open("a") as f:
            f.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
