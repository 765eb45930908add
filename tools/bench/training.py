"""Training speed on CPU beside plain torch and the peers that are installed, in lockstep.

    python tools/bench/training.py --precision fp32 bf16 --cycles 9
    python tools/bench/training.py --peers megatrain plain --json out.jsonl

A name with `+compile` is the peer under torch.compile.
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

from lockstep import HERE, Peer, Quartiles, run, speed_ratio
from peers import BOUND, PEERS, installed
from recipe import Shape

MODES = ("", "+compile")
ALL = [name + mode for mode in MODES for name in PEERS if (name, mode) != (BOUND, "+compile")]
OURS = "megatrain"


def measured(names: list[str], precision: str, cycles: int, threads: int, batch: int) -> list[dict[str, Any]]:
    """One launch: every peer started, warmed, stepped in turn. A line for each peer."""
    peers = []
    try:
        for name in names:
            peer, _, compiled = name.partition("+")
            program = [str(HERE / "peers.py"), peer, "--precision", precision]
            program += ["--threads", str(threads), "--batch", str(batch)]
            peers.append(Peer.start(name, program + ["--compile"] * bool(compiled), threads))
        run(peers, cycles)
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


def table(lines: list[dict[str, Any]], tokens: int) -> str:
    """Peers of one precision, the fastest first, with their speed relative to ours of the same mode."""
    costs, peaks, losses = defaultdict(list), defaultdict(list), {}
    for line in lines:
        costs[line["peer"]] += line["cpu"]
        peaks[line["peer"]].append(line["peak_bytes"])
        losses[line["peer"]] = line["losses"]
    base = "plain" if "plain" in costs else next(iter(costs))
    rows = [f"{'peer':22s} {'tokens/CPU-s':>12s}  {f'speed / {base}':24s} {'peak MiB':>8s}  loss: first, last"]
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


def environment(threads: int, cycles: int, launches: int, batch: int) -> dict[str, Any]:
    """What the figures depend on."""
    cpu = next(
        (r.split(":")[1].strip() for r in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in r), "?"
    )
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=10"]
    return {
        "date": str(date.today()),
        "device": f"{cpu} ({platform.machine()})",
        "threads": threads,
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()},
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "shape": asdict(Shape(batch=batch)),
        "cycles": cycles,
        "launches": launches,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument(
        "--peers", nargs="+", choices=ALL, default=[n for n in ALL if n.partition("+")[0] in installed()]
    )
    parser.add_argument("--cycles", type=int, default=9, help="steps, at least two, of each peer in a launch")
    parser.add_argument("--launches", type=int, default=1, help="times that everything is started anew")
    parser.add_argument("--batch", type=int, default=Shape.batch, help="sequences of a step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--json", type=Path, help="file to write the conditions and every step's cost to, a line a peer"
    )
    a = parser.parse_args()
    if absent := sorted(PEERS.keys() - installed()):
        print(f"left out, since they are not installed: {', '.join(absent)}")
    conditions, lines = environment(a.threads, a.cycles, a.launches, a.batch), []
    write(a.json, [conditions])
    for precision in a.precision:
        for launch in range(a.launches):
            costs = measured(a.peers, precision, a.cycles, a.threads, a.batch)
            lines += [line | {"launch": launch} for line in costs]
            write(a.json, [conditions, *lines])
        print(f"\n{precision}, {conditions['device']}, {a.threads} thread, {a.launches} x {a.cycles} cycles")
        print(
            table([line for line in lines if line["precision"] == precision], Shape(batch=a.batch).tokens), flush=True
        )


def write(path: Path | None, lines: list[dict[str, Any]]) -> None:
    """After each launch: a later one may fail."""
    if path:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
