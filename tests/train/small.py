"""A small run on real text, and ways to run it on real ranks."""

import dataclasses
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from safetensors import safe_open

from megatrain.base.device import Device
from megatrain.base.log import start_logging
from megatrain.cluster.identity import Identity
from megatrain.train.assemble import Session
from megatrain.train.check import refuse
from megatrain.train.hook import Handle, Hook, Record
from megatrain.train.hooks import HOOK
from megatrain.train.run import Run, read_run
from megatrain.train.stop import StopRequest


def write_run(folder: Path, data: Path, **changes: Any) -> Path:
    """A run file in `folder`; `changes` are dotted keys with "__" for the dot."""
    config: dict[str, Any] = {
        "model": {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48},
        "data": {"sources": [{"path": str(data)}], "seq_len": 32, "workers": 0},
        "train": {"steps": 12, "global_batch": 8, "eval_every": 6, "eval_batches": 2},
        "layout": {"micro_batch": 2},
        "optimizer": {"lr": 0.01, "clip": 0.5},
        "schedule": {"kind": "cosine", "warmup": 1},
        "checkpoint": {"every": 6},
        "log": {"dir": str(folder / "runs"), "wandb": {"mode": "disabled"}},
    }
    for key, value in changes.items():
        at = config
        *path, last = key.split("__")
        for name in path:
            at = at.setdefault(name, {})
        at[last] = value
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def metrics(folder: Path) -> list[Record]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def tensors(folder: Path, step: int) -> dict[str, bytes]:
    """Every stored slice of a checkpoint, as bytes."""
    found = {}
    for path in sorted((folder / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                found[key] = file.get_tensor(key).numpy().tobytes()
    return found


def session(run: Run) -> None:
    """Run `run` as this rank of the process group that is open already."""
    world = dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if world else (0, 1)
    identity = Identity(rank, size, rank, size, 0, "environment", "127.0.0.1", 0)
    start_logging(identity.rank)
    manifests = refuse(run, identity.world)
    mesh = run.layout.mesh(identity.world).at(identity.rank)
    if world:
        mesh = mesh.connect()
    with ExitStack() as stack:
        Session(run, manifests, mesh, Device.of("cpu"), identity, StopRequest(), stack).train()


def on_ranks(path: str, overrides: tuple[str, ...] = (), kill: tuple[int, int] | None = None) -> None:
    """What a rank does in the tests. `kill`: (rank, step) at which a rank kills itself as `kill -9` does."""
    run = read_run(path, overrides).run
    if kill is not None:
        run = dataclasses.replace(run, hooks=(*run.hooks, KillAt(rank=kill[0], step=kill[1])))
    session(run)


@HOOK.register("kill_at")
@dataclasses.dataclass(frozen=True, kw_only=True)
class KillAt:
    rank: int
    step: int

    def build(self, handle: Handle) -> Hook:
        return _Killer(self, handle)


class _Killer(Hook):
    def __init__(self, choice: KillAt, handle: Handle):
        self.choice, self.handle = choice, handle

    def due(self, step: int) -> bool:
        return step == self.choice.step

    def after_step(self, record: Record) -> None:
        if record["step"] == self.choice.step and self.handle.rank == self.choice.rank:
            os.kill(os.getpid(), 9)
