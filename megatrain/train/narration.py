"""What a run says on the console: before its first step, after its last one, and when another rank is lost."""

import re
from typing import Any

from megatrain.base.files import read_json_lines
from megatrain.base.log import log, warn
from megatrain.base.units import show_count
from megatrain.engine.dtypes import lines
from megatrain.report.page import write_report
from megatrain.train.folder import RunFolder
from megatrain.train.throughput import Throughput


def say_what_runs(facts: dict[str, Any], throughput: Throughput, schedule: str, resumed_at: int) -> None:
    """Model, mesh, engine, number formats and kernels.

    Args:
        facts: what does not change while the run goes on (`facts.facts_of`).
        schedule: in which order a pipeline takes micro-batches.
        resumed_at: the step to go on from; 0 for a new run.
    """
    mesh = " ".join(f"{axis}={size}" for axis, size in facts["mesh"].items() if size > 1) or "one rank"
    log(
        "%s: %s parameters, %s, engine %s, ZeRO %d, %s on %s; peak %.3g FLOP/s a rank (%s)",
        facts["name"],
        show_count(facts["parameters"]),
        mesh,
        facts["engine"],
        facts["zero"],
        facts["compute"],
        facts["device"],
        throughput.peak,
        throughput.peak_source,
    )
    for line in lines(facts["dtypes"]):
        log("  %s", line)
    for what, kernel in facts["kernels"].items():
        log("%s by %s", what, kernel)
    if facts["stages"] is not None:
        log("pipeline: schedule %s, layers of each stage %s", schedule, facts["stages"])
    if resumed_at:
        log("resumed at step %d of %d", resumed_at, facts["total_steps"])


def say_what_came(folder: RunFolder) -> None:
    """Held-out loss of the first weights and of the last that were measured, and where the report is."""
    measured = [e for e in read_json_lines(folder.events) if e["kind"] == "evaluated"]
    measured += [line for line in read_json_lines(folder.metrics) if "held_out_loss" in line]
    if len(measured) > 1:
        first, last = measured[0], measured[-1]
        log(
            "held-out loss %.3f before, %.3f at step %d (nats a token); bits per byte %.3f before, %.3f now",
            first["held_out_loss"],
            last["held_out_loss"],
            last["step"],
            first["bits_per_byte"],
            last["bits_per_byte"],
        )
    try:
        log("report: %s", write_report(folder.path))
    except Exception as error:  # a picture that cannot be drawn must not hide how the run ended
        warn("report.html was not written: %s: %s", type(error).__name__, error)


def loss_of_a_peer(error: Exception, step: int, saved: int) -> str:
    """The sentence for a collective that another rank did not answer after `step`."""
    words = re.sub(r"^\[\S+:\d+\] ", "", str(error).strip().splitlines()[0])  # not where in its source gloo says so
    words = words.split(". This may indicate")[0].split(". GLHF")[0]
    return (
        f"another rank is gone or does not answer after step {step} ({words}): see what ended it; "
        f"the same command goes on from step {saved}"
    )
