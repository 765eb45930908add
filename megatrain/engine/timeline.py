"""When each rank of a pipeline does what in a step, as text and as a picture.

What is done in which order comes from the schedule itself (`torch_pipelining.actions_of`). Here every action begins as
soon as its rank is free and what it needs is there; sending takes no time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatrain.engine.schedules import PipelinePlan
from megatrain.engine.torch_pipelining import Action, actions_of

UNITS = {"F": 1, "I": 1, "W": 1, "B": 2}
"""Length of an action in forwards of its stage: the gradients of inputs and of weights are as many products each."""

WORDS = {"F": "forward", "I": "gradients of inputs", "W": "gradients of weights", "B": "both gradients"}


@dataclass(frozen=True)
class Bar:
    """One action of one rank, and when it is under way."""

    action: Action
    begin: Fraction
    end: Fraction


@dataclass(frozen=True)
class Timeline:
    """A step of a pipeline: the bars of each rank, in order."""

    plan: PipelinePlan
    n_micro_batches: int
    ranks: list[list[Bar]]

    @property
    def length(self) -> Fraction:
        """Of the step, from the first action of any rank to the last; in forwards of an average stage."""
        return max(bars[-1].end for bars in self.ranks)

    def bubble_shares(self) -> list[Fraction]:
        """Share of the step that each rank is idle."""
        return [1 - sum((bar.end - bar.begin for bar in bars), Fraction(0)) / self.length for bars in self.ranks]


def timeline(plan: PipelinePlan, n_micro_batches: int, costs: Sequence[float] = ()) -> Timeline:
    """The timeline of one step.

    Args:
        costs: of each stage, in any unit; all alike where not given.

    Raises:
        RuntimeError: the schedule waits for itself.
    """
    units = stage_units(costs, plan.n_stages)
    todo = actions_of(plan, n_micro_batches)
    done: dict[tuple[str, int, int], Fraction] = {}  # (F, I or W, stage, micro-batch) -> end
    ranks: list[list[Bar]] = [[] for _ in todo]
    moved = True
    while moved:
        moved = False
        for bars, actions in zip(ranks, todo, strict=True):
            while len(bars) < len(actions):
                action = actions[len(bars)]
                needed = [done.get(need) for need in _needs(action, plan.n_stages)]
                if None in needed:
                    break
                begin = max([bars[-1].end if bars else Fraction(0), *(end for end in needed if end is not None)])
                bars.append(Bar(action, begin, begin + UNITS[action.kind] * units[action.stage]))
                for part in {"B": "IW"}.get(action.kind, action.kind):
                    done[part, action.stage, action.micro_batch] = bars[-1].end
                moved = True
    if any(len(bars) < len(actions) for bars, actions in zip(ranks, todo, strict=True)):
        raise RuntimeError(f"schedule {plan.schedule.torch_name} waits for itself")
    return Timeline(plan, n_micro_batches, ranks)


def stage_units(costs: Sequence[float], n_stages: int) -> list[Fraction]:
    """Costs so that they are 1 on average."""
    exact = [Fraction(cost) for cost in costs] or [Fraction(1)] * n_stages
    return [cost * n_stages / sum(exact) for cost in exact]


def _needs(action: Action, n_stages: int) -> list[tuple[str, int, int]]:
    """What must be done before: the stage before it on the way forward, the stage behind it on the way back."""
    stage, micro = action.stage, action.micro_batch
    if action.kind == "F":
        return [("F", stage - 1, micro)] if stage else []
    if action.kind == "W":
        return [("I", stage, micro)]
    return [("F", stage, micro), *([("I", stage + 1, micro)] if stage < n_stages - 1 else [])]


# ------------------------------------------------------------------------------------------------ text


def as_text(line: Timeline, columns: int = 120) -> str:
    """Rows of ranks, columns of time, cut into blocks that fit `columns`; one cell is one forward of an average stage.

    A cell says what begins in it: F3 is the forward of micro-batch 3, in small letters that of a later stage of the
    rank; `-` goes on, `.` is idle.
    """
    width = len(str(line.n_micro_batches - 1)) + 2
    rows = [_cells(bars, line.plan, width, round(line.length)) for bars in line.ranks]
    shares = line.bubble_shares()
    names = [f"rank {i} " for i in range(len(rows))]
    each = max(1, (columns - len(names[-1])) // width)
    blocks = []
    for start in range(0, len(rows[0]), each):
        blocks.append(
            "\n".join(
                f"{n:{len(names[-1])}}{''.join(r[start : start + each])}" for n, r in zip(names, rows, strict=True)
            )
        )
    legend = ", ".join(f"{kind} {WORDS[kind]}" for kind in WORDS if _uses(line, kind))
    idle = "\n".join(f"{n:{len(names[-1])}}idle {float(share):6.1%}" for n, share in zip(names, shares, strict=True))
    return "\n\n".join([*blocks, f"{legend}; small letters: a later stage of the same rank", idle])


def _cells(bars: list[Bar], plan: PipelinePlan, width: int, n: int) -> list[str]:
    cells = [".".ljust(width)] * n
    for bar in bars:
        first, stop = round(bar.begin), max(round(bar.begin) + 1, round(bar.end))
        kind = bar.action.kind if bar.action.stage < plan.pp else bar.action.kind.lower()
        label = f"{kind}{bar.action.micro_batch}"
        for i in range(first, min(stop, n)):
            cells[i] = (label if i == first else "-").ljust(width)
    return cells


def _uses(line: Timeline, kind: str) -> bool:
    return any(bar.action.kind == kind for bars in line.ranks for bar in bars)


# ------------------------------------------------------------------------------------------------ picture

MOST_NUMBERS = 2000
"""Bars that carry the number of their micro-batch: more could not be read."""
COLOURS = {"F": "#4c78a8", "I": "#f58518", "W": "#54a24b", "B": "#e45756"}


def draw(line: Timeline, title: str, path: Path) -> None:
    """A PNG with a row a rank, a bar an action, and each rank's bubble share at its end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    length, n_ranks = float(line.length), len(line.ranks)
    figure = Figure(figsize=(min(40, 3 + length / 5), 1.4 + 0.5 * n_ranks), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    numbered = sum(map(len, line.ranks)) <= MOST_NUMBERS
    for rank, (bars, share) in enumerate(zip(line.ranks, line.bubble_shares(), strict=True)):
        _draw_bars(axes, rank, bars, first_stages=line.plan.pp, numbered=numbered)
        axes.text(length * 1.005, rank, f"idle {float(share):.1%}", va="center", fontsize=8)
    for kind, words in WORDS.items():
        if _uses(line, kind):
            axes.barh(0, 0, color=COLOURS[kind], label=words)
    axes.set(yticks=range(n_ranks), yticklabels=[f"rank {r}" for r in range(n_ranks)], xlim=(0, length * 1.08))
    axes.set(xlabel="time, in forwards of an average stage", title=title)
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.3 if n_ranks < 4 else -0.18), ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)


def _draw_bars(axes: Any, rank: int, bars: list[Bar], *, first_stages: int, numbered: bool) -> None:
    """Stages that the rank holds beside its first are paler. Bars of one look are one object, or many would take
    minutes."""
    looks: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for bar in bars:
        begin, width = float(bar.begin), float(bar.end - bar.begin)
        looks.setdefault((bar.action.kind, bar.action.stage >= first_stages), []).append((begin, width))
        if numbered:
            axes.text(
                begin + width / 2, rank, str(bar.action.micro_batch), ha="center", va="center", fontsize=6,
                color="white",
            )  # fmt: skip
    for (kind, later), spans in looks.items():
        axes.broken_barh(
            spans, (rank - 0.4, 0.8), facecolor=COLOURS[kind], alpha=0.55 if later else 1.0,
            edgecolor="white", linewidth=0.6,
        )  # fmt: skip
