"""A training step beside peers on a card that is not there: launches, memory, and a time by roofline. No GPU is used.

    python tools/bench/audited.py --shapes gpu-1b gpu-8b-6l
    python tools/bench/audited.py --peers megatrain plain+compile --json out.jsonl

Every peer trains as it would on a card, in bf16: under autocast, or with bf16 parameters and float32 masters where its
own trainer shards. Operators run on tensors without memory; compiled code is written by Inductor for an H100 and its
host's part run. Counts are exact; tokens per second are a model of them (`megatrain/audit/roofline.py`), not measured.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import warnings
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatrain.audit import fake_cuda

HERE = Path(__file__).resolve().parent
WITHOUT = {"products", "megatron-core"}
"""No trainer, and one whose layers without Transformer Engine are not what it trains with on a card."""

MANY = 8
"""Micro-batches that a step is modelled with beside one."""

COLUMNS = ("launches", 13), ("GB moved", 15), ("GB kept", 8), ("GB peak", 13), ("tokens/s", 8), (f"{MANY} x", 8)
HEADING = f"{'peer':22s} " + " ".join(f"{name:>{width}s}" for name, width in COLUMNS)


def audited(name: str, shape_name: str, micro_batches: int) -> dict[str, Any]:
    """Costs of the second step of a peer."""
    fake_cuda.install()  # before torch
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from megatrain.audit.compiled import without_kernels
    from megatrain.audit.generated import code_for
    from megatrain.audit.watch import Watch

    warnings.simplefilter("ignore")
    torch.nn.init.trunc_normal_ = lambda tensor, *_, **__: tensor  # looks at values until they please it
    import peers
    from recipe import SHAPES

    shape = dataclasses.replace(SHAPES[shape_name], micro_batches=micro_batches)
    peer, _, compiled = name.partition("+")
    watch = Watch()
    with FakeTensorMode(allow_non_fake_inputs=True), fake_cuda.card(), code_for(), without_kernels():
        with torch.device("cuda"), Watch():  # which answers those that read a value as they build
            step = peers.PEERS[peer](shape, True, bool(compiled))
        with Watch():
            step()
        watch.hold(*step.kept())
        static = watch.memory.live
        with watch:
            step()
    costs = watch.costs
    return {
        "peer": name,
        "shape": shape_name,
        "micro_batches": micro_batches,
        "launches": costs.launches,
        "bytes_moved": costs.bytes_moved,
        "static_bytes": static,
        "peak_bytes": watch.memory.peak,
        "reserved_bytes": watch.memory.reserved,
        "tokens": shape.tokens,
        "modelled_seconds": sum(costs.seconds.values()),
        "modelled_ms": {op: round(1000 * s, 3) for op, s in sorted(costs.seconds.items(), key=lambda item: -item[1])},
        "operators": dict(costs.operators.most_common()),
    }


def main() -> None:
    from peers import installed  # and with it torch, which must come second where a card is played
    from recipe import SHAPES
    from training import commit, write

    names = [name for name in installed() if name not in WITHOUT]
    everyone = names + [f"{name}+compile" for name in names]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["gpu-1b", "gpu-8b-6l"])
    parser.add_argument("--peers", nargs="+", choices=everyone, default=everyone, metavar="PEER")
    parser.add_argument("--json", type=Path, help="file to write a line a peer to")
    a = parser.parse_args()
    conditions = {"date": str(date.today()), "commit": commit(), "torch": version("torch"), "card": "H100, modelled"}
    lines: list[dict[str, Any]] = [conditions]
    for shape in a.shapes:
        print(f"\n{shape}, bf16: of one micro-batch, and of the second what it adds; tokens/s are modelled")
        print(HEADING)
        for name in a.peers:
            seen = [in_a_process(name, shape, n) for n in (1, 2)]
            lines += seen
            print(f"{name:22s} {row(*seen)}", flush=True)
            write(a.json, lines)


def row(one: dict[str, Any], two: dict[str, Any]) -> str:
    """What one micro-batch costs, and what the second adds; speed with one and with many."""
    if failed := one.get("failed") or two.get("failed"):
        return failed
    launches = f"{one['launches']:6d} + {two['launches'] - one['launches']:4d}"
    moved = f"{one['bytes_moved'] / 1e9:6.1f} + {(two['bytes_moved'] - one['bytes_moved']) / 1e9:6.1f}"
    peak = f"{one['peak_bytes'] / 1e9:5.2f}, {two['peak_bytes'] / 1e9:5.2f}"
    more = two["modelled_seconds"] - one["modelled_seconds"]
    many = MANY * one["tokens"] / (one["modelled_seconds"] + (MANY - 1) * more)
    speeds = f"{one['tokens'] / one['modelled_seconds']:8.0f} {many:8.0f}"
    return f"{launches:>13s} {moved:>15s} {one['static_bytes'] / 1e9:8.2f} {peak:>13s} {speeds}"


def in_a_process(name: str, shape: str, micro_batches: int) -> dict[str, Any]:
    """`audited` where nothing has loaded torch yet."""
    program = [sys.executable, str(HERE / "audited.py"), "--one", name, shape, str(micro_batches)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not answers:
        return {"peer": name, "shape": shape, "failed": (done.stderr.strip().splitlines() or ["?"])[-1]}
    return json.loads(answers[-1])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        peer, shape, micro_batches = sys.argv[2:]
        print(json.dumps(audited(peer, shape, int(micro_batches))))
    else:
        main()
