"""What does not change while a run goes on: told on the console, kept in events.jsonl, shown in the report."""

from typing import Any

import torch

from megatrain.base.device import Device
from megatrain.checkpoint.origin import revision, versions
from megatrain.data.manifest import TokenizerEntry
from megatrain.engine.dtypes import dtype_table
from megatrain.engine.layout import resolve_engine
from megatrain.parallel.mesh import Mesh
from megatrain.parallel.product import CPU_MULTIPLIES_BF16
from megatrain.train.build import pipeline_of
from megatrain.train.config import Run
from megatrain.train.kernels import kernel_table
from megatrain.train.throughput import Throughput


def facts_of(run: Run, tokenizer: TokenizerEntry, mesh: Mesh, device: Device, run_id: str | None) -> dict[str, Any]:
    """Names and sizes, as JSON values."""
    resolved, plan = resolve_engine(run.layout, mesh.size), pipeline_of(run, tokenizer)
    return {
        "name": run.name,
        "run_id": run_id,
        "parameters": run.model.n_parameters(tokenizer.vocab_size),  # of the undivided model
        "ranks": mesh.size,
        "mesh": {axis: mesh.axis(axis).size for axis in ("pp", "dp", "cp", "tp")},
        "stages": None if plan is None else list(plan.layers),
        "engine": resolved.engine,
        "zero": resolved.zero,
        "device": device.name(),
        "compute": run.precision.compute,
        "dtypes": dtype_table(
            run.precision, engine=resolved.engine, zero=resolved.zero, moments=run.optimizer.moments
        ),
        "kernels": kernel_table(run, device),
        "total_steps": run.total_steps,
        "tokens_per_step": run.train.global_batch * run.data.seq_len,
        "revision": revision(),
        "versions": versions(),
    }  # fmt: skip


def throughput_of(run: Run, tokenizer: TokenizerEntry, world: int, device: Device) -> Throughput:
    """What a step is measured by: the model's FLOPs and the device's peak in the format that products run in."""
    bf16 = run.precision.compute == "bf16" and (device.kind != "cpu" or CPU_MULTIPLIES_BF16)
    peak, source = device.peak_flops(torch.bfloat16 if bf16 else torch.float32)
    flops = run.model.flops_per_token(tokenizer.vocab_size, run.data.seq_len)
    return Throughput(flops, peak, source, world, device)
