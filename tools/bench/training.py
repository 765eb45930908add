"""Training speed beside plain torch and the peers that are installed: on CPU in lockstep, on a card in turns.

    python tools/bench/training.py --precision fp32 bf16 --cycles 9
    python tools/bench/training.py --peers megatrain plain --json out.jsonl
    python tools/bench/training.py --device cuda --shape gpu-1b --precision bf16 --launches 3 --cycles 30

A name with `+compile` is the peer under torch.compile. On a CPU costs are CPU time, on a card wall time; there one
peer has the card for itself at a time, and `--launches` makes them take turns.
"""

import argparse
import json
import platform
import subprocess
from collections import defaultdict
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lockstep import HERE, Peer, Quartiles, run, speed_ratio
from peers import BOUND, PEERS, installed
from recipe import SHAPES

MODES = ("", "+compile")
ALL = [name + mode for mode in MODES for name in PEERS if (name, mode) != (BOUND, "+compile")]
OURS = "megatrain"


def measured(names: list[str], precision: str, a: argparse.Namespace) -> list[dict[str, Any]]:
    """One launch: every peer started, warmed, stepped in turn. A line for each peer."""
    if a.device == "cuda" and len(names) > 1:  # two would not fit
        return [line for name in names for line in measured([name], precision, a)]
    peers = []
    try:
        for name in names:
            peer, _, compiled = name.partition("+")
            program = [str(HERE / "peers.py"), peer, "--precision", precision, "--threads", str(a.threads)]
            program += ["--shape", a.shape, "--device", a.device, "--warmup", "10" if a.device == "cuda" else "2"]
            peers.append(Peer.start(name, program + ["--compile"] * bool(compiled), a.threads))
        run(peers, a.cycles)
    finally:
        for p in peers:
            p.stop()
    return [
        {
            "peer": p.name,
            "precision": precision,
            "cpu": p.cpu,
            "wall": p.wall,
            "losses": p.losses,
            "peak_bytes": p.peak_bytes,
        }
        for p in peers
    ]


def table(lines: list[dict[str, Any]], tokens: int, device: str) -> str:
    """Peers of one precision, the fastest first, with their speed relative to ours of the same mode."""
    costs, peaks, losses = defaultdict(list), defaultdict(list), {}
    cost, unit = ("wall", "tokens/s") if device == "cuda" else ("cpu", "tokens/CPU-s")
    for line in lines:
        costs[line["peer"]] += line[cost]
        peaks[line["peer"]].append(line["peak_bytes"])
        losses[line["peer"]] = line["losses"]
    base = "plain" if "plain" in costs else next(iter(costs))
    rows = [f"{'peer':22s} {unit:>12s}  {f'speed / {base}':24s} {'peak MiB':>8s}  loss: first, last"]
    for name in sorted(costs, key=lambda n: -speed_ratio(costs[n], costs[base]).median):
        speed = tokens / Quartiles.of(costs[name]).median
        ratio, mib = speed_ratio(costs[name], costs[base]), max(peaks[name]) / 2**20
        rows.append(
            f"{name:22s} {speed:12.0f}  {ratio!s:24s} {mib:8.0f}  {losses[name][0]:.4f}, {losses[name][-1]:.4f}"
        )
    for mode in MODES:
        others = [n for n in costs if n.endswith("+compile") == bool(mode) and not n.startswith(OURS) and n != BOUND]
        for other in others if OURS + mode in costs else []:
            rows.append(f"{OURS + mode} is {speed_ratio(costs[OURS + mode], costs[other])} times as fast as {other}")
    for name in (OURS + mode for mode in MODES if BOUND in costs and OURS + mode in costs):
        share = speed_ratio(costs[name], costs[BOUND])
        rows.append(f"{name} has {share} of the speed that its matrix products and attention alone would have")
    return "\n".join(rows)


def commit() -> str:
    """Of what is measured; with `-dirty` where files differ from it."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=10"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()


def environment(a: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    rows = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((row.split(":")[1].strip() for row in rows if "model name" in row), "?")
    return {
        "date": str(date.today()),
        "device": torch.cuda.get_device_name() if a.device == "cuda" else f"{cpu} ({platform.machine()})",
        "threads": a.threads,
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()},
        "commit": commit(),
        "shape": asdict(SHAPES[a.shape]),
        "cycles": a.cycles,
        "launches": a.launches,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument(
        "--peers", nargs="+", choices=ALL, default=[n for n in ALL if n.partition("+")[0] in installed()]
    )
    parser.add_argument("--cycles", type=int, default=9, help="steps, at least two, of each peer in a launch")
    parser.add_argument("--launches", type=int, default=1, help="times that everything is started anew")
    parser.add_argument("--shape", choices=SHAPES, default="cpu-tiny")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--json", type=Path, help="file to write the conditions and every step's cost to, a line a peer"
    )
    a = parser.parse_args()
    if a.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA card here; tools/bench/audited.py counts a step without one")
    if absent := sorted(PEERS.keys() - installed()):
        print(f"left out, since they are not installed: {', '.join(absent)}")
    conditions, lines = environment(a), []
    write(a.json, [conditions])
    for precision in a.precision:
        for launch in range(a.launches):
            costs = measured(a.peers, precision, a)
            lines += [line | {"launch": launch} for line in costs]
            write(a.json, [conditions, *lines])
        print(f"\n{precision}, {conditions['device']}, {a.threads} thread, {a.launches} x {a.cycles} cycles")
        of_this = [line for line in lines if line["precision"] == precision]
        print(table(of_this, SHAPES[a.shape].tokens, a.device), flush=True)


def write(path: Path | None, lines: list[dict[str, Any]]) -> None:
    """After each launch: a later one may fail."""
    if path:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
