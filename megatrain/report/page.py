"""report.html: a run as one page, without a network, readable on a phone and in the dark."""

import html
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatrain.base.files import written_whole
from megatrain.base.units import show_count, show_seconds
from megatrain.report import guard
from megatrain.report.chart import Curve, Mark, Scale, chart
from megatrain.report.look import SCRIPT, STYLE
from megatrain.report.run import RunRecord, read_run, summary

MARKED = ("resumed", "saved", "skipped", "spike", "preempted", "failed")
"""Kinds of events that charts show."""
MOST_MARKS = 200
"""Marks of a kind in one chart; of more, every n-th is drawn."""
MOST_EVENTS = 60
"""Rows of the table of events: the last ones."""


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into the run's folder, and return its path.

    Raises:
        DataError: there is no run to report, or a file of it is damaged.
    """
    path = Path(run_dir) / "report.html"
    text = page(read_run(run_dir))
    with written_whole(path) as file:
        file.write(text)
    return path


def page(run: RunRecord, *, reload_seconds: int | None = None) -> str:
    """The whole page as text; one that is served may ask to be loaded again."""
    refresh = f'<meta http-equiv="refresh" content="{reload_seconds}">' if reload_seconds else ""
    step, total = run.steps[-1].get("step"), run.facts.get("total_steps")
    progress = f"step {step:,}" + (f" of {total:,}" if isinstance(total, int) else "")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{refresh}'
        f"<title>{_text(run.name)} · megatrain</title><style>{STYLE}</style></head><body>"
        f'<header><h1>{_text(run.name)}</h1><span class="badge {run.outcome}">{run.outcome}</span>'
        f'<span class="note">{progress}{_when(run)}</span></header>'
        f"{_figures(run)}{_charts(run)}"
        f'<div class="two">{_facts(run)}{_events(run)}{_formats(run)}{_kernels(run)}{_layers(run)}</div>{_config(run)}'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


# ------------------------------------------------------------------------------------------------ figures


def _figures(run: RunRecord) -> str:
    s = summary(run)

    def change(first: float | None, last: float | None) -> str | None:
        if first is None or last is None:
            return None
        return f"{first:.3f} → {last:.3f}" if first != last else f"{last:.3f}"

    figures = [
        ("training loss, nats a token", f"{s['loss']:.3f}" if s["loss"] is not None else "not finite"),
        ("held-out loss, before → now", change(s["held_out_loss_first"], s["held_out_loss_last"])),
        ("bits per byte, before → now", change(s["bits_per_byte_first"], s["bits_per_byte_last"])),
        ("tokens trained on", show_count(s["tokens"]) if s["tokens"] else None),
        ("tokens/s, median", show_count(s["tokens_per_second"]) if s["tokens_per_second"] else None),
        ("MFU, median", f"{100 * s['mfu']:.1f}%" if s["mfu"] is not None else None),
        ("parameters", show_count(s["parameters"]) if s["parameters"] else None),
        ("steps skipped", str(s["skipped"]) if s["skipped"] else None),
    ]
    cards = [f'<div class="card figure"><b>{_text(v)}</b><span>{_text(k)}</span></div>' for k, v in figures if v]
    return f'<div class="figures">{"".join(cards)}</div>'


# ------------------------------------------------------------------------------------------------ charts


def _charts(run: RunRecord) -> str:
    marks = _marks(run)

    def smooth(label: str, key: str, role: str = "main", factor: float = 1.0) -> Curve:
        return Curve(label, [(step, factor * value) for step, value in run.points(key)], role, smoothed=True)

    loss = [smooth("loss", "loss"), Curve("held out", run.points("held_out_loss"), "second", dots=True)]
    mfu = [smooth("MFU", "mfu", factor=100), smooth("as PaLM counts", "mfu_palm", "third", factor=100)]
    waits = [
        (row["step"], 100 * row["data_seconds"] / row["step_seconds"])
        for row in run.steps
        if row.get("step_seconds") and row.get("data_seconds") is not None
    ]
    plain = Scale(from_zero=True)
    rates = Scale(lambda value: f"{value:.2g}", from_zero=True)
    robust = Scale(from_zero=True, robust=True)
    cards = [
        _card("Loss, nats a token", loss, Scale(), marks, wide=True),
        _card("Learning rate", [Curve("lr", run.points("lr"))], rates, marks),
        _card("Gradient norm", [smooth("norm", "grad_norm")], robust, marks),
        _card("Tokens per second", [smooth("tokens/s", "tokens_per_second")], replace(robust, show=show_count), marks),
        _card("MFU, %", mfu, robust, marks),
        _card("Peak memory, GiB", [Curve("memory", run.points("memory_gib"))], plain, marks),
        _card("Error of layers in eight bits, %", guard.error_curves(run), plain, marks),
        _card("Loss above that in bf16, nats a token", guard.gap_curves(run), Scale(), marks),
        _card("Waiting for data, % of the step", [Curve("wait", waits, smoothed=True)], robust, marks),
    ]
    return f'<div class="charts">{"".join(cards)}</div>'


def _card(title: str, curves: Sequence[Curve], scale: Scale, marks: Sequence[Mark], *, wide: bool = False) -> str:
    """A chart with its title and legend; nothing where the run has no value to draw."""
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    drawing = chart(title, curves, scale, marks)
    legend = ""
    if wide:
        broad = chart(title, curves, scale, marks, size=(1140, 330))
        narrow = chart(title, curves, scale, marks, size=(380, 260))
        drawing = f'<div class="broad">{broad}</div><div class="narrow">{narrow}</div>'
        kinds = [kind for kind in MARKED if any(mark.kind == kind for mark in marks)]
        legend = "".join(f'<span><i class="{c.role}"></i>{_text(c.label)}</span>' for c in curves)
        legend += "".join(f'<span><i class="tall mark {kind}"></i>{kind}</span>' for kind in kinds)
    elif len(curves) > 1:
        legend = "".join(f'<span><i class="{c.role}"></i>{_text(c.label)}</span>' for c in curves)
    return (
        f'<section class="card{" wide" if wide else ""}"><div class="top"><h2>{_text(title)}</h2>'
        f'<span class="legend">{legend}</span><span class="readout"></span></div>{drawing}</section>'
    )


def _marks(run: RunRecord) -> list[Mark]:
    found: dict[str, list[Mark]] = {kind: [] for kind in MARKED}
    for event in run.events:
        kind, step = event.get("kind"), event.get("step")
        if kind in found and isinstance(step, int | float):
            found[kind].append(Mark(step, kind, f"{kind} at step {step:,}"))
    if not found["skipped"]:  # the metrics know too
        found["skipped"] = [
            Mark(row["step"], "skipped", f"step {row['step']:,} skipped") for row in run.steps if row.get("skipped")
        ]
    return [mark for marks in found.values() for mark in marks[:: -(-len(marks) // MOST_MARKS) or 1]]


# ------------------------------------------------------------------------------------------------ tables


def _facts(run: RunRecord) -> str:
    facts, s = run.facts, summary(run)
    versions, mesh = facts.get("versions") or {}, facts.get("mesh") or {}
    layout = " ".join(f"{axis}={size}" for axis, size in mesh.items() if size != 1)
    zero = f", ZeRO {facts['zero']}" if facts.get("zero") else ""
    rows = {
        "run": facts.get("run_id"),
        "parameters": f"{facts['parameters']:,}" if isinstance(facts.get("parameters"), int) else None,
        "tokens": f"{s['tokens']:,}" if s["tokens"] else None,
        "held-out loss": _from_to(s["held_out_loss_first"], s["held_out_loss_last"]),
        "bits per byte": _from_to(s["bits_per_byte_first"], s["bits_per_byte_last"]),
        "device": f"{facts.get('ranks', 1)} x {facts['device']}" if facts.get("device") else None,
        "layout": layout or ("one rank" if mesh else None),
        "engine": f"{facts['engine']}{zero}" if facts.get("engine") else None,
        "compute": facts.get("compute"),
        "MFU as PaLM counts": f"{100 * s['mfu_palm']:.1f}%" if s["mfu_palm"] is not None else None,
        "peak behind MFU": facts.get("peak_source"),
        "peak memory": f"{s['memory_gib']:.3g} GiB" if s["memory_gib"] else None,
        "time in steps": show_seconds(sum(value for _, value in run.points("step_seconds"))),
        "git revision": facts.get("revision") or versions.get("git"),
        **{package: version for package, version in versions.items() if package != "git"},
        "folder": run.folder.resolve(),
    }
    return f'<section class="card"><h2>Facts</h2>{_table(rows.items())}</section>'


def _formats(run: RunRecord) -> str:
    table = run.facts.get("dtypes")
    return f'<section class="card"><h2>Number formats</h2>{_table(table.items())}</section>' if table else ""


def _kernels(run: RunRecord) -> str:
    table = run.facts.get("kernels")
    return f'<section class="card"><h2>Kernels</h2>{_table(table.items())}</section>' if table else ""


def _layers(run: RunRecord) -> str:
    rows = guard.layer_rows(run)
    return f'<section class="card"><h2>Layers in eight bits</h2>{_table(rows)}</section>' if rows else ""


def _events(run: RunRecord) -> str:
    rows = []
    telling = [event for event in run.events if event.get("kind") != "guard" or guard.changed(event)]
    for event in telling[-MOST_EVENTS:][::-1]:
        when = event.get("time")
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(when)) if isinstance(when, int | float) else ""
        skip = ("time", "step", "kind", "facts", "lines", *guard.BY_LAYER)
        detail = ", ".join(f"{key} {_brief(value)}" for key, value in event.items() if key not in skip and value)
        rows.append(
            (clock, f"{event.get('kind', '?')} at step {event.get('step', '?')}" + (f": {detail}" if detail else ""))
        )
    if not rows:
        return ""
    more = len(telling) - len(rows)
    note = f'<p class="note">and {more:,} earlier</p>' if more > 0 else ""
    return f'<section class="card"><h2>Events, latest first (UTC)</h2>{_table(rows)}{note}</section>'


def _config(run: RunRecord) -> str:
    if not run.config_text:
        return ""
    text = _text(without_secrets(run.config_text.strip()))
    return f'<details class="card"><summary>Configuration</summary><pre>{text}</pre></details>'


_SECRET_KEY = re.compile(
    r"^(\s*(?:- )?[\w.]*(?:password|passwd|secret|api_key|access_key|access_token))(\s*:\s*)\S.*$", re.M | re.I
)
_LOGIN = re.compile(r"(\w://)[^/\s@]+@")
_QUERY = re.compile(r"(\w+://[^\s?'\"]+)\?[^\s'\"]+")


def without_secrets(text: str) -> str:
    """`text` without the values of password-like keys, and without logins and queries (signatures) in addresses."""
    text = _SECRET_KEY.sub(r"\1\2(hidden)", text)
    return _QUERY.sub(r"\1?(hidden)", _LOGIN.sub(r"\1(hidden)@", text))


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    cells = (f"<tr><th>{_text(key)}</th><td>{_text(value)}</td></tr>" for key, value in rows if value not in (None, ""))
    return f"<table>{''.join(cells)}</table>"


def _from_to(first: float | None, last: float | None) -> str | None:
    return None if first is None or last is None else f"{first:.4f} before, {last:.4f} now"


def _when(run: RunRecord) -> str:
    times = [event["time"] for event in run.events if isinstance(event.get("time"), int | float)]
    return f" · {time.strftime('%Y-%m-%d %H:%M', time.gmtime(times[-1]))} UTC" if times else ""


def _brief(value: Any) -> str:
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return without_secrets(text if len(text) <= 200 else text[:200] + "…")


def _text(value: Any) -> str:
    return html.escape(str(value))
