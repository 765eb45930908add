"""What the guard over layers in eight bits found, as curves and as a table: read from the events of a run."""

import math
import statistics
from typing import Any

from megatrain.report.chart import Curve
from megatrain.report.run import RunRecord

BY_LAYER = ("errors", "saturated", "flushed")
"""Keys of an event that hold a number for each layer."""


def changed(event: dict[str, Any]) -> bool:
    """Whether a look demoted or promoted a layer."""
    return bool(event.get("demoted") or event.get("promoted"))


def looks(run: RunRecord) -> list[dict[str, Any]]:
    """Events in which the guard compared layers with bf16, in order; after a rewind only the later of two of a step."""
    by_step = {e["before_step"]: e for e in run.events if e.get("kind") == "guard" and e.get("errors")}
    return [by_step[step] for step in sorted(by_step)]


def error_curves(run: RunRecord) -> list[Curve]:
    """The largest and the median relative error of layers' outputs, in percent."""
    found = looks(run)
    largest = [(e["before_step"], _percent(max(e["errors"].values()))) for e in found]
    median = [(e["before_step"], _percent(statistics.median(e["errors"].values()))) for e in found]
    return [Curve("largest", largest, dots=True), Curve("median", median, "second", dots=True)]


def gap_curves(run: RunRecord) -> list[Curve]:
    """Loss less that of the same weights with all layers in bf16, on one micro-batch."""
    gaps = [(e["before_step"], float(e["loss_gap"])) for e in looks(run)]
    return [Curve("loss gap", [(step, gap) for step, gap in gaps if math.isfinite(gap)], dots=True)]


def layer_rows(run: RunRecord) -> list[tuple[str, str]]:
    """Each layer's state after the last look and how it came about, those in bf16 first."""
    found = looks(run)
    if not found:
        return []
    last = found[-1]
    changes: dict[str, list[str]] = {}
    for e in found:
        for what in ("demoted", "promoted"):
            for name in e.get(what, ()):
                changes.setdefault(name, []).append(f"{what} at step {e['before_step']:,}")
    in_bf16 = set(last["in_bf16"])
    rows = []
    for name in sorted(last["errors"], key=lambda name: (name not in in_bf16, name)):
        state = "bf16" if name in in_bf16 else "eight bits"
        error, flushed = _percent(last["errors"][name]), _percent(last.get("flushed", {}).get(name, 0.0))
        words = [state, f"error {error:.2f}%", f"{flushed:.3g}% of operands became 0", *changes.get(name, [])]
        rows.append((name, ", ".join(words)))
    return rows


def _percent(share: float) -> float:
    return 100 * min(share, 10.0) if math.isfinite(share) else 1000.0
