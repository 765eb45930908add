"""Line charts as SVG text: a few kilobytes each, sharp at any size, coloured by the page's style sheet."""

import html
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]

BUCKETS = 320
"""Ranges of steps that a curve is thinned to; each keeps its lowest and highest value, so no spike is lost."""
SMOOTHING = 40
"""A smoothed curve is a median over windows of this fraction of its points."""


@dataclass(frozen=True)
class Curve:
    """One line of a chart. `role` is its CSS class: main, second or third."""

    label: str
    points: Points
    role: str = "main"
    smoothed: bool = False
    """Draw the values pale and their running median on top."""
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step: a vertical line with a tip."""

    step: float
    kind: str
    text: str


@dataclass(frozen=True)
class Frame:
    """Where data lands on the canvas, in SVG units."""

    width: int
    height: int
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    left: int = 50
    right: int = 10
    top: int = 10
    bottom: int = 24

    def x(self, step: float) -> float:
        low, high = self.x_range
        return self.left + (step - low) / (high - low) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.height - self.bottom - (value - low) / (high - low) * (self.height - self.top - self.bottom)


def thinned(points: Points, buckets: int = BUCKETS) -> list[tuple[float, float]]:
    """At most 2 `buckets` points: of every bucket the lowest and the highest value, in the order they came."""
    if len(points) <= 2 * buckets:
        return list(points)
    kept: list[tuple[float, float]] = []
    for i in range(buckets):
        part = points[i * len(points) // buckets : (i + 1) * len(points) // buckets]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def running_median(points: Points, places: int = BUCKETS // 2) -> list[tuple[float, float]]:
    """The median around `places` evenly spread points, each over a window that lies centred on it.

    Unlike an exponential average it does not lag behind a falling loss, and one spike does not move it.
    """
    half = max(1, len(points) // SMOOTHING // 2)
    found = []
    for i in sorted({round(k * (len(points) - 1) / max(1, places - 1)) for k in range(places)}):
        window = points[max(0, i - half) : i + half + 1]
        found.append((points[i][0], statistics.median(value for _, value in window)))
    return found


def ticks(low: float, high: float, n: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) within [low, high], about `n` of them."""
    raw = (high - low) / max(1, n)
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((power, 2 * power, 5 * power, 10 * power), key=lambda s: abs(math.log(s / raw)))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Scale:
    """How the values of a chart are laid out and written."""

    show: Callable[[float], str] = lambda value: f"{value:.4g}"
    robust: bool = False
    """Leave out the outermost hundredth of the values on each side, so that one outlier does not flatten the rest."""
    from_zero: bool = False

    def bounds(self, curves: Sequence[Curve]) -> tuple[float, float]:
        """The range of values to show, with a little room."""
        values = sorted(value for curve in curves for _, value in curve.points)
        cut = len(values) // 100 if self.robust else 0
        low, high = values[cut], values[-1 - cut]
        if self.from_zero:
            low = min(0.0, low)
        room = (high - low) * 0.05 or max(abs(high) * 0.05, 1e-12)
        return (low if self.from_zero and low == 0 else low - room), high + room


def chart(
    title: str,
    curves: Sequence[Curve],
    scale: Scale = Scale(),
    marks: Sequence[Mark] = (),
    size: tuple[int, int] = (380, 200),
) -> str:
    """An SVG of `curves` (at least one with a point) over steps, with `marks`.

    The page's script reads the values under the pointer from the `data-curves` attribute.
    """
    drawn = [curve for curve in curves if curve.points]
    steps = [step for curve in drawn for step, _ in curve.points]
    x_range = (min(steps), max(steps)) if min(steps) < max(steps) else (min(steps) - 0.5, max(steps) + 0.5)
    frame = Frame(*size, x_range, scale.bounds(drawn))
    label = html.escape(title, quote=True)
    data = [{"label": c.label, "role": c.role, "points": _short(thinned(c.points, BUCKETS // 2))} for c in drawn]
    parts = [
        f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img" aria-label="{label}" '
        f'data-left="{frame.left}" data-right="{frame.right}" data-range="{x_range[0]:g},{x_range[1]:g}" '
        f"data-curves='{html.escape(json.dumps(data, separators=(',', ':')))}'>",
        *_grid(frame, scale.show),
        *(_mark(frame, mark) for mark in marks if x_range[0] <= mark.step <= x_range[1]),
        # A nested svg clips what lies beyond the frame without an id, which would have to be unique in the page.
        f'<svg x="0" y="{frame.top}" width="{frame.width}" height="{frame.height - frame.top - frame.bottom}" '
        f'viewBox="0 {frame.top} {frame.width} {frame.height - frame.top - frame.bottom}">',
        *(line for curve in drawn for line in _lines(frame, curve)),
        "</svg>",
        f'<line class="cursor" y1="{frame.top}" y2="{frame.height - frame.bottom}"/>',
        "</svg>",
    ]
    return "".join(parts)


def _short(points: Points) -> list[list[float]]:
    """Points with the digits that a reader can use."""
    return [[step, float(f"{value:.5g}")] for step, value in points]


def _grid(frame: Frame, show: Callable[[float], str]) -> list[str]:
    found = []
    for value in ticks(*frame.y_range):
        x, y, text = frame.left - 6, f"{frame.y(value):.1f}", html.escape(show(value))
        found.append(f'<line class="grid" x1="{frame.left}" x2="{frame.width - frame.right}" y1="{y}" y2="{y}"/>')
        found.append(f'<text class="tick" x="{x}" y="{y}" dy=".32em" text-anchor="end">{text}</text>')
    for step in ticks(*frame.x_range, n=frame.width // 110):
        if step == int(step):
            at = frame.x(step)
            anchor = "end" if at > frame.width - 24 else "middle"
            found.append(
                f'<text class="tick" x="{at:.1f}" y="{frame.height - 8}" text-anchor="{anchor}">{int(step):,}</text>'
            )
    return found


def _mark(frame: Frame, mark: Mark) -> str:
    x, text = f"{frame.x(mark.step):.1f}", html.escape(mark.text)
    top = frame.height - frame.bottom - 6 if mark.kind == "saved" else frame.top  # saves are many: a tick will do
    return (
        f'<line class="mark {html.escape(mark.kind, quote=True)}" x1="{x}" x2="{x}" y1="{top}" '
        f'y2="{frame.height - frame.bottom}"><title>{text}</title></line>'
    )


def _lines(frame: Frame, curve: Curve) -> list[str]:
    found = []
    if curve.smoothed and len(curve.points) >= 10:
        found.append(_path(frame, thinned(curve.points), f"line {curve.role} pale"))
        found.append(_path(frame, running_median(curve.points), f"line {curve.role}"))
    else:
        found.append(_path(frame, thinned(curve.points), f"line {curve.role}"))
    if curve.dots or len(curve.points) == 1:
        found += [
            f'<circle class="dot {curve.role}" cx="{frame.x(step):.1f}" cy="{frame.y(value):.1f}" r="2.5"/>'
            for step, value in thinned(curve.points, 60)
        ]
    return found


def _path(frame: Frame, points: Points, classes: str) -> str:
    # A value far beyond the frame is drawn just outside it: browsers lose precision with huge coordinates.
    def y(value: float) -> float:
        return min(max(frame.y(value), -frame.height), 2 * frame.height)

    places = " ".join(f"{frame.x(step):.1f},{y(value):.1f}" for step, value in points)
    return f'<polyline class="{classes}" points="{places}"/>'
