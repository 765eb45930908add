"""Held-out loss of several settings of one run, paired by seed: what a number format or an optimiser costs or gains.

    python tools/bench/curves.py precision --data demo/data --steps 1000 --seeds 3
    python tools/bench/curves.py optimizers --data demo/data --steps 1000 --seeds 3 --out curves

For each setting and seed the same model is trained on the same tokens. The table gives the mean difference from the
baseline with its interval (Student's t over seeds, 95%); `--out` gets the raw lines, the table and a picture.
Curves that are there, of the same data and steps, from a call that was stopped are not trained again.
"""

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.base.device import Device
from megatrain.base.files import read_json_lines
from megatrain.data.feed import held_out
from megatrain.nn.precision.fp8 import Fp8, cast
from megatrain.nn.precision.recipe import GRADIENT, Rounded
from megatrain.parallel.mesh import Axis, Mesh
from megatrain.train.build import build_engine, open_feed
from megatrain.train.check import refuse
from megatrain.train.config import Run, read_run

RUN = Path(__file__).parents[2] / "configs/run/tiny.yaml"
T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
"""Student's t of 0.975 by degrees of freedom."""

BF16 = ("precision.compute=bf16",)
ALL_LAYERS = {"min_size": 0, "keep_first": 0, "keep_last": 0, "guard_every": 0}
"""Nothing is spared, so that whatever eight bits cost is seen."""


@dataclass(frozen=True, kw_only=True)
class Unscaled(Fp8):
    """Gradients as they are in a format that cannot hold numbers so small: what dynamic scales are for."""

    def round(self, x: Tensor, what: str, axis: Axis) -> Rounded:
        if what != GRADIENT:
            return super().round(x, what, axis)
        return Rounded(cast(x.float(), torch.float8_e4m3fn), torch.ones((), device=x.device))


def eight_bits(what: str, **options: Any) -> tuple[str, ...]:
    return (*BF16, *(f"precision.{what}.{name}={value}" for name, value in (ALL_LAYERS | options).items()))


FAILING = "fp8-unscaled"
SETTINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "precision": {
        "fp32": (),
        "bf16": (*BF16, "precision.parameters=bf16"),
        "fp8-tensorwise": eight_bits("fp8"),
        "fp8-rowwise": eight_bits("fp8", kind="rowwise"),
        "fp8-mx": eight_bits("fp8", kind="mx"),
        "int8": eight_bits("int8"),
        "fp8-tensorwise-low": eight_bits("fp8", weight_gradient="low"),
        "fp8-rowwise-low": eight_bits("fp8", kind="rowwise", weight_gradient="low"),
        "fp8-mx-low": eight_bits("fp8", kind="mx", weight_gradient="low"),
        "int8-low": eight_bits("int8", weight_gradient="low"),
        FAILING: eight_bits("fp8", weight_gradient="low"),
    },
    "optimizers": {
        "adamw": (),
        "adamw-lr*2": ("optimizer.lr=6e-3",),
        "adamw_8bit": ("optimizer.kind=adamw_8bit", "optimizer.lr=3e-3"),
        "muon": ("optimizer.kind=muon", "optimizer.lr=3e-3"),
        "muon-lr*2": ("optimizer.kind=muon", "optimizer.lr=6e-3"),
        "lion": ("optimizer.kind=lion", "optimizer.lr=6e-4"),
    },
}
"""The first of each is the baseline. A new optimizer.kind replaces the section, so what it needs is named again."""


@dataclass(frozen=True)
class Curve:
    setting: str
    seed: int
    points: list[tuple[int, float]]
    """(step, held-out loss in nats a token)."""

    @property
    def last(self) -> float:
        return self.points[-1][1]


def chosen(group: str, setting: str, data: str, steps: int, seed: int, more: tuple[str, ...] = ()) -> Run:
    """The demonstration's run, eight rows a step, under a setting."""
    common = (
        f"data.sources.0.path={data}", "data.workers=0", f"train.steps={steps}", "train.global_batch=8",
        "layout.micro_batch=8", "train.eval_batches=4", "layout.engine=plain", "layout.device=cpu", f"seed={seed}",
        f"schedule.warmup={max(1, min(40, steps // 10))}",
    )  # fmt: skip
    run = read_run(RUN, [*common, *SETTINGS[group][setting], *more]).run
    if setting == FAILING:
        options = dataclasses.asdict(run.precision.fp8)  # type: ignore[call-overload]
        run = dataclasses.replace(run, precision=dataclasses.replace(run.precision, fp8=Unscaled(**options)))
    return run


def train(run: Run, setting: str, every: int) -> Curve:
    """Train `run` in this process; held-out loss every so many steps and at the end."""
    device = Device.of("cpu")
    manifests = refuse(run, 1)
    engine = build_engine(run, manifests[0].tokenizer, Mesh(), device)
    held = list(
        held_out(run.data, global_batch=run.train.global_batch, n_batches=run.train.eval_batches, manifests=manifests)
    )

    def loss() -> float:
        totals = [engine.evaluate(batch) for batch in held]
        return float(sum(total for total, _ in totals) / sum(count for _, count in totals))

    points = []
    with open_feed(run, Mesh(), device, manifests) as feed:
        for step in range(1, run.total_steps + 1):
            engine.step(next(feed), run.optimizer.lr * run.schedule.lr_factor(step, run.total_steps))
            if step % every == 0 or step == run.total_steps:
                points.append((step, round(loss(), 5)))
    engine.close()
    return Curve(setting, run.seed, points)


def curves(
    group: str, data: str, steps: int, seeds: range, settings: list[str], every: int, known: list[Curve]
) -> Iterator[Curve]:
    """A curve for each seed and setting: the known one, if it was evaluated at the same steps, or a new one."""
    wanted = [*range(every, steps, every), steps]
    there = {(c.setting, c.seed): c for c in known if [step for step, _ in c.points] == wanted}
    for seed in seeds:
        for setting in settings:
            yield there.get((setting, seed)) or train(chosen(group, setting, data, steps, seed), setting, every)


def differences(found: list[Curve], setting: str, baseline: str) -> tuple[float, float]:
    """Mean of the last held-out losses less the baseline's of the same seed, relative, and half its 95% interval."""
    by_seed = {c.seed: c.last for c in found if c.setting == baseline}
    pairs = [c.last / by_seed[c.seed] - 1 for c in found if c.setting == setting and c.seed in by_seed]
    if len(pairs) < 2:
        return statistics.fmean(pairs), math.inf
    return statistics.fmean(pairs), T95[len(pairs) - 1] * statistics.stdev(pairs) / math.sqrt(len(pairs))


def table(found: list[Curve]) -> str:
    baseline = found[0].setting
    lines = [f"{'setting':<16} {'held-out loss':>14} {'against ' + baseline:>20}"]
    for setting in dict.fromkeys(c.setting for c in found):
        mean = statistics.fmean(c.last for c in found if c.setting == setting)
        off, half = differences(found, setting, baseline)
        margin = "" if setting == baseline else f"{100 * off:+.2f}% +- {100 * half:.2f}%"
        lines.append(f"{setting:<16} {mean:>14.4f} {margin:>20}")
    return "\n".join(lines)


def draw(found: list[Curve], path: Path) -> None:
    """Mean curves with the range over seeds, and their relative distance from the baseline."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 8), sharex=True)
    baseline = found[0].setting
    base = {(c.seed, step): loss for c in found if c.setting == baseline for step, loss in c.points}
    for setting in dict.fromkeys(c.setting for c in found):
        mine = [c for c in found if c.setting == setting]
        steps = [step for step, _ in mine[0].points]
        losses = [[c.points[i][1] for c in mine] for i in range(len(steps))]
        (line,) = above.plot(steps, [statistics.fmean(row) for row in losses], label=setting)
        above.fill_between(steps, [min(r) for r in losses], [max(r) for r in losses], color=line.get_color(), alpha=0.2)
        gaps = [[100 * (c.points[i][1] / base[c.seed, s] - 1) for c in mine] for i, s in enumerate(steps)]
        below.plot(steps, [statistics.fmean(row) for row in gaps], color=line.get_color())
    above.set_ylabel("held-out loss, nats a token")
    above.legend()
    below.set_ylabel(f"difference from {baseline}, %")
    below.set_xlabel("step")
    below.set_ylim(-15, 15)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=list(SETTINGS))
    parser.add_argument("--data", default="demo/data")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=0, help="steps between evaluations (a fifth of all by default)")
    parser.add_argument("--settings", nargs="*", help="some of the group's, the baseline first")
    parser.add_argument("--out", type=Path, help="folder for the raw lines, the table and the picture")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: list[Curve] = []
    settings = options.settings or list(SETTINGS[options.group])
    every = options.every or max(1, options.steps // 5)
    known: list[Curve] = []
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        lines = read_json_lines(options.out / f"{options.group}.jsonl")
        known = [
            Curve(line["setting"], line["seed"], [tuple(point) for point in line["points"]])
            for line in lines
            if line.get("data") == options.data
        ]
    begin = time.process_time()
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    for curve in curves(options.group, options.data, options.steps, seeds, settings, every, known):
        found.append(curve)
        if any(curve is one for one in known):
            continue
        print(
            f"{curve.setting} seed {curve.seed}: {curve.last:.4f} ({time.process_time() - begin:.0f} CPU-s)", flush=True
        )
        if options.out:
            with open(options.out / f"{options.group}.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"data": options.data} | dataclasses.asdict(curve)) + "\n")
    print(table(found))
    if options.out:
        (options.out / f"{options.group}.txt").write_text(table(found) + "\n", encoding="utf-8")
        draw(found, options.out / f"{options.group}.png")


if __name__ == "__main__":
    main()
