"""A run folder as a value: its configuration, its steps and its events."""

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatrain.base.errors import DataError
from megatrain.base.files import read_json_lines

Points = list[tuple[float, float]]
"""(step, value), in order of step, all finite."""

SETTLED_SHARE = 0.1
"""The first share of the steps that typical figures leave out: caches and compilers are still warming up."""


@dataclass(frozen=True)
class RunRecord:
    """What a run has written down so far."""

    folder: Path
    config_text: str
    """config.yaml as it stands."""
    config: dict[str, Any]
    steps: list[dict[str, Any]]
    """Lines of metrics.jsonl."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """Lines of events.jsonl."""
    _points: dict[str, Points] = field(default_factory=dict, repr=False, compare=False)
    """What `points` found already."""

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.facts.get("name") or self.folder.resolve().name)

    @property
    def facts(self) -> dict[str, Any]:
        """What the run noted about itself when it last started or resumed."""
        noted = [event["facts"] for event in self.events if isinstance(event.get("facts"), dict)]
        return noted[-1] if noted else {}

    @property
    def outcome(self) -> str:
        """finished, preempted or failed; or running, as far as the files tell."""
        ends = ("finished", "preempted", "failed", "started", "resumed")
        kinds = [event.get("kind") for event in self.events if event.get("kind") in ends]
        return str(kinds[-1]) if kinds and kinds[-1] in ends[:3] else "running"

    def points(self, key: str) -> Points:
        """The finite values of `key` over steps; an evaluation before the first step counts as step 0."""
        if key not in self._points:
            rows = [event for event in self.events if event.get("kind") == "evaluated"] + self.steps
            self._points[key] = [
                (row["step"], float(row[key])) for row in rows if _finite(row.get(key)) and _finite(row.get("step"))
            ]
        return self._points[key]

    def typical(self, key: str) -> float | None:
        """The median of `key` once the run has settled."""
        values = [value for _, value in self.points(key)]
        settled = values[int(len(values) * SETTLED_SHARE) :]
        return statistics.median(settled) if settled else None


def read_run(run_dir: str | Path) -> RunRecord:
    """The run in `run_dir`; a last line that a crash cut short is left out.

    Raises:
        DataError: there is no run, it has no step yet, or a file is damaged.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise DataError(f"there is no run folder {folder}: give a folder that holds metrics.jsonl, such as runs/NAME")
    steps = read_json_lines(folder / "metrics.jsonl")
    if not steps:
        raise DataError(f"{folder} holds no step of a run (no line in metrics.jsonl): train it first, or give another")
    path = folder / "config.yaml"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not YAML ({error}): restore it from a checkpoint's manifest") from None
    events = read_json_lines(folder / "events.jsonl")
    return RunRecord(folder, text, config if isinstance(config, dict) else {}, steps, events)


def summary(run: RunRecord) -> dict[str, Any]:
    """The run in a few figures, None where it has not measured one."""
    last = run.steps[-1]
    held_out, bits = run.points("held_out_loss"), run.points("bits_per_byte")
    return {
        "name": run.name,
        "outcome": run.outcome,
        "step": last.get("step"),
        "total_steps": run.facts.get("total_steps"),
        "tokens": last.get("tokens"),
        "parameters": run.facts.get("parameters"),
        "loss": last.get("loss") if _finite(last.get("loss")) else None,
        "held_out_loss_first": held_out[0][1] if held_out else None,
        "held_out_loss_last": held_out[-1][1] if held_out else None,
        "bits_per_byte_first": bits[0][1] if bits else None,
        "bits_per_byte_last": bits[-1][1] if bits else None,
        "tokens_per_second": run.typical("tokens_per_second"),
        "mfu": run.typical("mfu"),
        "mfu_palm": run.typical("mfu_palm"),
        "memory_gib": max((value for _, value in run.points("memory_gib")), default=None),
        "skipped": sum(bool(row.get("skipped")) for row in run.steps),
    }


def _finite(value: Any) -> bool:
    return type(value) in (float, int) and math.isfinite(value)
