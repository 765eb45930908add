"""The proof for one's own run: its first steps under a layout beside the same steps of one process.

Both sides run with gloo ranks on this machine, in float32, on the run's own data, with AdamW. After the first step
AdamW's first moment is (1 - beta1) times the gradient that was applied, whatever engine reduced, sharded and clipped
it; so checkpoints of both sides, which hold full tensors, are all that must be compared.
"""

import contextlib
import dataclasses
import math
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.base.device import Device
from megatrain.base.errors import ConfigError, RunError
from megatrain.base.files import read_json, write_json
from megatrain.base.log import log, start_logging
from megatrain.checkpoint.checkpoints import Checkpoints
from megatrain.checkpoint.read import Reader, find
from megatrain.cluster.identity import identity_of
from megatrain.cluster.local_ranks import run_local_ranks
from megatrain.cluster.start import connected
from megatrain.config.build import build, plain
from megatrain.config.source import Node, from_plain, scalar_or_list
from megatrain.engine.api import Precision
from megatrain.engine.layout import AUTO, Layout
from megatrain.optim.kinds.adamw import AdamW
from megatrain.parallel.mesh import Mesh
from megatrain.train.build import build_engine, open_feed
from megatrain.train.check import refuse
from megatrain.train.config import Run, read_run
from megatrain.train.diagnosis import Difference, Evidence, Limits, first_difference
from megatrain.train.flow import Flow, flow_differences

LIMITS = Limits()
"""What counts as equal in float32."""

EPS = 1e-4
"""AdamW's eps on both sides. Where a gradient is almost nothing a small one makes a full step of its rounding error."""

AXES = ("tp", "pp", "cp", "ep", "dp")


@dataclass(frozen=True)
class Verdict:
    """Largest relative differences, and what is off first on the way through a step."""

    layout: str
    steps: int
    loss: float
    norm: float
    gradients: float
    first: Difference | None = None

    @property
    def equal(self) -> bool:
        return self.loss <= LIMITS.loss and self.norm <= LIMITS.norm and self.gradients <= LIMITS.gradient

    def line(self) -> str:
        figures = f"loss {self.loss:.0e} norm {self.norm:.0e} gradients {self.gradients:.0e}"
        if self.equal:
            return f"equal: {figures}"
        assert self.first is not None
        return f"differs: {self.first.name} ({self.first.suspect}) by {self.first.relative:.0e}; {figures}"


def layout_of(text: str, base: Layout) -> tuple[Layout, int]:
    """The layout that `tp=2,dp=2,zero=1` or `pp=2,stages=[3,1]` describes, and its number of ranks.

    Axes that are not named have size 1 and `zero` is 0, or what fsdp2 does by itself; what else `base` says stays, but
    for the stages of a pipeline where there is none.

    Raises:
        ConfigError: nothing is named, a word is not a key of the layout, stands twice, or is not of its type.
    """
    words = [
        word.strip() for word in re.findall(r"(?:\[[^\]]*\]|\"[^\"]*\"|[^,])+", text)
    ]  # not at commas in [] and ""
    if not words:
        raise ConfigError(f"--layout {text!r} names nothing: write for example tp=2,dp=2,zero=1")
    named: dict[str, Node] = {}
    for word in words:
        key, equals, value = (part.strip() for part in word.partition("="))
        if not equals:
            raise ConfigError(f"--layout {text}: {word!r} is not key=value: write for example tp=2")
        if key in named:
            raise ConfigError(f"--layout {text}: {key} stands twice: leave one out")
        named[key] = scalar_or_list(value, "--layout")
    under = plain(base) | dict.fromkeys(AXES, 1)
    engine = named["engine"].value if "engine" in named else base.engine
    under["zero"] = None if engine == "fsdp2" else 0
    if "pp" not in named or named["pp"].value == 1:
        under |= {"virtual": None, "stages": AUTO}
    tree = from_plain(under, "the run file")
    layout, _ = build(Layout, Node(tree.value | named, "--layout"))
    return layout, layout.fewest_ranks


def verify(run_file: str, overrides: Sequence[str], layout: str, steps: int) -> Verdict:
    """Compare `steps` steps of a run under `layout` with the same steps of one process.

    Raises:
        ConfigError: the run or the layout is wrong.
        RunError: a side did not come to its end.
    """
    run = read_run(run_file, overrides).run
    chosen, world = layout_of(layout, run.layout)
    one = "engine=plain"
    refuse(prepared(run, chosen), world)
    refuse(prepared(run, layout_of(one, run.layout)[0]), 1)
    with tempfile.TemporaryDirectory(prefix="megatrain-verify-") as name:
        folder = Path(name)
        for side, text, n in (("one", one, 1), ("many", layout, world)):
            command = [sys.executable, "-m", "megatrain.train.verify", run_file, text, str(steps), str(folder / side)]
            code = run_local_ranks(n, [*command, *overrides])
            if code:
                raise RunError(f"the side of {_ranks(n) if n == 1 else layout} ended with exit code {code}")
        return compare(folder / "one", folder / "many", layout, steps, chosen)


def prepared(run: Run, layout: Layout) -> Run:
    """The run as both sides compute it: float32, on CPU, AdamW with the run's own rate and clip."""
    optimizer = run.optimizer
    if not isinstance(optimizer, AdamW):
        optimizer = AdamW(lr=optimizer.lr, clip=optimizer.clip)
    optimizer = dataclasses.replace(optimizer, eps=EPS)
    layout = dataclasses.replace(layout, device="cpu")
    return dataclasses.replace(run, layout=layout, precision=Precision(), optimizer=optimizer)


# ------------------------------------------------------------------------------------------------ one side


def measure(run_file: str, layout_text: str, steps: int, folder: Path, overrides: Sequence[str]) -> None:
    """This rank's part of one side: losses and norms to `folder`/numbers.json, and the state after step 1."""
    identity = identity_of(os.environ)
    start_logging(identity.rank)
    run = read_run(run_file, overrides).run
    run = prepared(run, layout_of(layout_text, run.layout)[0])
    torch.set_num_threads(1)
    with connected(identity, Device.of("cpu")):
        mesh = run.layout.mesh(identity.world).at(identity.rank)
        take_steps(run, mesh.connect() if identity.world > 1 else mesh, steps, folder)


def _ranks(n: int) -> str:
    return "one process" if n == 1 else f"{n} ranks"


def take_steps(run: Run, mesh: Mesh, steps: int, folder: Path) -> None:
    """Take `steps` steps from the start of the run as one rank of `mesh`, and write down what `compare` reads."""
    device = Device.of("cpu")
    manifests = refuse(run, mesh.size)
    engine: Any = build_engine(run, manifests[0].tokenizer, mesh, device)
    flow = Flow(engine.parts.model, mesh, run.layout.context(mesh).columns(run.data.seq_len))
    checkpoints = Checkpoints(folder, mesh.axis("world"))
    losses, norms = [], []
    with open_feed(run, mesh, device, manifests) as feed:
        for step in range(1, steps + 1):
            with flow if step == 1 else contextlib.nullcontext():
                report = engine.step(next(feed), run.optimizer.lr * run.schedule.lr_factor(step, run.total_steps))
            losses.append(float(report.loss))
            log("%s: step %d of %d, loss %.6f", _ranks(mesh.size), step, steps, losses[-1])
            norms.append(float(report.grad_norm))
            if step in (1, steps):
                checkpoints.save(step, engine.slices(), {}, {}, asynchronous=False)
    names = flow.save(folder, mesh.rank)
    divisors = [max(1.0, norm / (run.optimizer.clip or math.inf)) for norm in norms]
    numbers = {"losses": losses, "norms": norms, "divisors": divisors, "flow": names}
    write_json(folder / f"numbers-{mesh.rank}.json", numbers)
    checkpoints.close()
    engine.close()


# ------------------------------------------------------------------------------------------------ comparing


def compare(one: Path, many: Path, layout_text: str, steps: int, layout: Layout) -> Verdict:
    """What differs between the two sides."""
    numbers, theirs = (read_json(side / "numbers-0.json") for side in (one, many))
    losses, norms = (list(map(relative, numbers[what], theirs[what])) for what in ("losses", "norms"))
    a, b, a_end, b_end = (find(side / f"step-{step:08d}").reader() for step in (1, steps) for side in (one, many))
    unclipped = theirs["divisors"][0] / numbers["divisors"][0]  # gradients were clipped by a norm that may be wrong
    evidence = Evidence(
        flow=list(flow_differences(one, many, numbers["flow"])),
        losses=losses,
        gradients=_differences(a, b, "exp_avg", unclipped),
        norms=norms,
        apart=_apart(many, layout),
        weights=_differences(a, b, "weights"),
        averages=_differences(a_end, b_end, "exp_avg"),
    )
    worst = max(share for _, share in [*_differences(a, b, "exp_avg"), *evidence.averages])
    return Verdict(layout_text, steps, max(losses), max(norms), worst, first_difference(evidence, layout, LIMITS))


def _apart(many: Path, layout: Layout) -> list[tuple[str, float]]:
    """Axes along which ranks have different norms in step 1, and the largest relative difference."""
    norms = [read_json(path)["norms"][0] for path in sorted(many.glob("numbers-*.json"), key=_rank)]
    mesh, found = layout.mesh(len(norms)), []
    for axis in ("tp", "pp", "data"):
        rows = [mesh.at(rank).axis(axis).ranks for rank in range(len(norms))]
        found.append((axis, max(relative(norms[row[0]], norms[rank]) for row in rows for rank in row)))
    return found


def _rank(numbers: Path) -> int:
    return int(numbers.stem.split("-")[1])


def _differences(a: Reader, b: Reader, state: str, factor: float = 1.0) -> list[tuple[str, float]]:
    """Each tensor's difference between `a` and `factor` times `b`."""
    return [(name, _distance(a.read_full(name, state), b.read_full(name, state) * factor)) for name in a.names(state)]


def relative(x: float, y: float) -> float:
    """|x - y| relative to |x|; infinite where one is no number."""
    if x == y:
        return 0.0
    difference = abs(x - y) / max(abs(x), 1e-30)
    return difference if difference == difference else float("inf")


def _distance(x: Tensor, y: Tensor) -> float:
    """Largest difference of two tensors, relative to the largest entry of the first."""
    scale = float(x.abs().max())
    difference = float((x - y).abs().max())
    if difference == 0:
        return 0.0
    return difference / max(scale, 1e-30) if difference == difference else float("inf")


if __name__ == "__main__":
    measure(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5:])
