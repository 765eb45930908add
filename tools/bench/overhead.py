"""What does a step of `megatrain train` cost over the bare model in a loop?

    python tools/bench/overhead.py [--precision fp32 bf16] [--cycles 21] [--json FILE]

Two processes take turns, step by step (`lockstep.py`). `bare` is the model, backward, clipping and fused AdamW in a
loop over one batch. `train` is the whole command: batches read and packed in the process itself, the engine, metrics,
ledger, events and the lines of the console. Same model, weights and shapes; CPU time of the process, one thread.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from lockstep import HERE, Peer, run
from recipe import BETAS, CLIP, EPS, LR, THETA, WEIGHT_DECAY, Shape, Step, by_hand, decoder

SHAPE = Shape()


def bare(bf16: bool) -> Step:
    from megatrain.nn.batch import Batch

    model, (tokens, targets) = decoder(SHAPE), SHAPE.rows()
    positions = torch.arange(SHAPE.seq_len).expand_as(tokens)
    batch = Batch(
        tokens, targets, torch.ones(tokens.shape), positions, torch.zeros_like(tokens).int(), most_documents=1
    )
    return by_hand(model, lambda: model(batch)[0] / SHAPE.tokens, bf16)


def data_set(folder: Path) -> Path:
    """Four million tokens in documents of a thousand."""
    from megatrain.data.manifest import TRAIN, Manifest, Split, TokenizerEntry
    from megatrain.data.shards import ShardWriter

    rng = np.random.default_rng(0)
    with ShardWriter(folder, TRAIN, 0, "uint16") as writer:
        for i in range(4000):
            writer.write(f"{i}", rng.integers(1, SHAPE.vocab_size, 1000).astype(np.uint16), 4000)
    entry = TokenizerEntry("0" * 64, SHAPE.vocab_size, 0)
    Manifest("random", entry, "uint16", {TRAIN: Split((writer.entry,))}).write(folder)
    return folder


def run_file(folder: Path, precision: str) -> Path:
    s = SHAPE
    path = folder / "run.yaml"
    model = {"kind": "decoder", "d_model": s.d_model, "n_layers": s.n_layers, "n_heads": s.n_heads, "d_ff": s.d_ff}
    model |= {"tie_embeddings": False, "norm": {"kind": "rms_norm", "eps": EPS}, "vocab_size": s.vocab_size}
    optimizer = {"kind": "adamw", "lr": LR, "betas": list(BETAS)}
    path.write_text(
        yaml.safe_dump(
            {
                "name": "overhead",
                "model": model | {"position": {"kind": "rotary", "theta": THETA}},
                "data": {
                    "sources": [{"path": str(data_set(folder / "data"))}],
                    "seq_len": s.seq_len,
                    "workers": 0,  # in the process, so that what reading costs is counted
                    "mask_documents": False,  # as in the bare loop
                },
                "train": {"steps": 10**6, "global_batch": s.batch},
                "layout": {"engine": "plain", "micro_batch": s.batch},
                "optimizer": optimizer | {"weight_decay": WEIGHT_DECAY, "clip": CLIP},
                "schedule": {"kind": "cosine", "warmup": 10},
                "precision": {"compute": precision},
                "log": {"dir": str(folder / "runs"), "wandb": {"mode": "disabled"}},
                "hooks": [{"kind": "turn"}],
            }
        )
    )
    return path


def serve_train(precision: str, warmup: int) -> None:
    """The command, with a hook that waits for its turn after each step."""
    from megatrain.train.hook import Handle, Hook, Record
    from megatrain.train.hooks import HOOK
    from megatrain.train.run import train

    @HOOK.register("turn")
    @dataclass(frozen=True)
    class Turn:
        def build(self, handle: Handle) -> Hook:
            return _Turn()

    class _Turn(Hook):
        def __init__(self) -> None:
            self.losses: list[float] = []
            self.cpu = self.wall = 0.0

        def due(self, step: int) -> bool:
            return True

        def after_step(self, record: Record) -> None:
            if len(self.losses) < warmup:
                self.losses.append(record["loss"])
                if len(self.losses) < warmup:
                    return
                say({"ready": True, "losses": self.losses})
            else:
                cpu, wall = time.process_time() - self.cpu, time.perf_counter() - self.wall
                say({"cpu": cpu, "wall": wall, "loss": record["loss"], "peak_bytes": 0})
            if not sys.stdin.readline():
                os._exit(0)
            self.cpu, self.wall = time.process_time(), time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        train(str(run_file(Path(folder), precision)))


def say(answer: dict) -> None:
    print(json.dumps(answer), flush=True)


def serve_bare(precision: str, warmup: int) -> None:
    step = bare(precision == "bf16")
    say({"ready": True, "losses": [step() for _ in range(warmup)]})
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        loss = step()
        say({"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "loss": loss, "peak_bytes": 0})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--cycles", type=int, default=21)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file to append a line for each precision to")
    parser.add_argument("--serve", choices=["bare", "train"], help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.serve:
        torch.set_num_threads(1)
        return (serve_bare if a.serve == "bare" else serve_train)(a.precision[0], a.warmup)
    for precision in a.precision:
        program = [str(HERE / "overhead.py"), "--precision", precision, "--warmup", str(a.warmup), "--serve"]
        peers = [Peer.start(name, [*program, name], 1) for name in ("bare", "train")]
        run(peers, a.cycles)
        for peer in peers:
            peer.stop()
        ratios = statistics.quantiles((b / a for a, b in zip(peers[0].cpu, peers[1].cpu, strict=True)), n=4)
        found = {"precision": precision, "bare": peers[0].cpu, "train": peers[1].cpu, "ratio": ratios[1]}
        print(
            f"{precision}: a step of `train` costs {ratios[1]:.3f} [{ratios[0]:.3f} {ratios[2]:.3f}] of the bare loop's"
        )
        if a.json:
            with open(a.json, "a") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
