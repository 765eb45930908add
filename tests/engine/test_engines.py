"""Every engine, on any number of ranks, does what plain torch does in one process: the same numbers, the same state."""

import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.engine.kinds.deepspeed import DeepSpeed
from tests.engine.toy import (
    Pieces,
    assembled,
    connected,
    filler,
    floats,
    pieces_of,
    rows_of,
    toy_batch,
    toy_engine,
)
from tests.ranks import run

ROWS, STEPS, MIDDLE, REPLAYED, LR = 8, 20, 10, 3, 1e-2
HELD_OUT = 999


@dataclass(frozen=True)
class Case:
    kind: str
    zero: int = 0
    ranks: int = 2
    tp: int = 1
    micro_batch: int = 1
    whole_parameters: bool = False
    """ZeRO-3 keeps these small parameters on every rank, as it does by default."""
    precision: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        axes = f"tp{self.tp}-dp{self.ranks // self.tp}"
        kept = "-whole" if self.whole_parameters else ""
        return f"{self.kind}-{self.zero}-{axes}-micro{self.micro_batch}{kept}" + "".join(
            f"-{v}" for v in self.precision.values()
        )

    def engine(self) -> Any:
        mesh = connected(self.tp)
        options: dict[str, Any] = dict(micro_batch=self.micro_batch, sequence=self.tp > 1, **self.precision)
        if self.kind == "deepspeed" and not self.whole_parameters:
            options["choice"] = DeepSpeed(persistent_below=0)
        return toy_engine(self.kind, self.zero, mesh, **options), mesh


@dataclass
class Story:
    """What one rank saw."""

    reports: list[tuple[float, float, float, float]]
    held_out: tuple[float, float]
    middle: Pieces
    end: Pieces
    replayed: list[tuple[float, float, float, float]]
    """Reports of the steps after the middle once more, after loading it."""
    poisoned: tuple[float, float, float, float]
    unchanged: bool
    """A step whose gradient is not finite on one rank left all state as it was."""
    adopted: Pieces
    """The state after loading that of the reference."""
    continued: list[tuple[float, float, float, float]]
    """Reports of the same steps from the reference's middle."""


def tell(case: Case, reference: dict[tuple[str, str], Tensor] | None) -> Story:
    """Train, evaluate, save, meet a NaN, load, and train on, in one start."""
    engine, mesh = case.engine()
    armed = []
    victim = engine.model.layers["0"].feed_forward_norm.weight
    victim.register_hook(lambda g: g * math.nan if armed else None)

    def step(k: int) -> tuple[float, float, float, float]:
        return floats(engine.step(rows_of(toy_batch(k, ROWS), mesh), LR))

    reports = [step(k) for k in range(MIDDLE)]
    middle = pieces_of(engine)
    loss_sum, count = engine.evaluate(rows_of(toy_batch(HELD_OUT, ROWS), mesh))
    reports += [step(k) for k in range(MIDDLE, STEPS)]
    end = pieces_of(engine)

    if mesh.rank == mesh.size - 1:
        armed.append(True)
    steps = engine.scalars()
    poisoned = step(HELD_OUT)
    armed.clear()
    after = pieces_of(engine)
    unchanged = engine.scalars() == steps and all(torch.equal(a[1], b[1]) for a, b in zip(end, after, strict=True))

    gathered = everyone(middle) if reference is not None else [middle]
    engine.load(filler(assembled(gathered)))
    engine.load_scalars({"optimizer_steps": MIDDLE})
    replayed = [step(k) for k in range(MIDDLE, MIDDLE + REPLAYED)]
    adopted, continued = middle, replayed
    if reference is not None:
        engine.load(filler(reference))
        engine.load_scalars({"optimizer_steps": MIDDLE})
        adopted = pieces_of(engine)
        continued = [step(k) for k in range(MIDDLE, MIDDLE + REPLAYED)]
    engine.close()
    return Story(
        reports, (float(loss_sum), float(count)), middle, end, replayed, poisoned, unchanged, adopted, continued
    )


def everyone(pieces: Pieces) -> list[Pieces]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, pieces)
    return found


@cache
def reference() -> Story:
    """One process, all rows at once."""
    return tell(Case("plain", ranks=1, micro_batch=ROWS), None)


CASES = [
    Case("plain", ranks=2),
    *(Case("deepspeed", zero, ranks=2, micro_batch=1) for zero in (0, 1, 2, 3)),
    *(Case("deepspeed", zero, ranks=4, micro_batch=2) for zero in (0, 1, 2, 3)),
    Case("deepspeed", 3, ranks=2, micro_batch=2, whole_parameters=True),
    Case("plain", ranks=4, tp=2, micro_batch=2),
    *(Case("deepspeed", zero, ranks=4, tp=2, micro_batch=2) for zero in (0, 1, 2, 3)),
]


def assert_reports_near(ours, theirs, rel=1e-5):
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=rel)


def test_the_reference_clips_and_learns():
    reports = reference().reports
    assert all(report[2] > 0.5 for report in reports), "the clip is not active"
    assert reports[-1][0] < reports[0][0]
    assert len({report[1] for report in reports}) > 3, "token counts are equal"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_engine_equals_one_process_of_plain_torch(case):
    expected = reference()
    stories = run(tell, case.ranks, case, assembled([expected.middle]))
    middle, end, adopted = (assembled([getattr(s, part) for s in stories]) for part in ("middle", "end", "adopted"))
    for story in stories:
        assert_reports_near(story.reports, expected.reports)
        assert story.held_out == pytest.approx(expected.held_out, rel=1e-5)
        assert story.poisoned[3] == 1, "a gradient that is not finite was not skipped"
        assert story.unchanged
        assert story.replayed == story.reports[MIDDLE : MIDDLE + REPLAYED], "loading is not exact to the last bit"
        assert_reports_near(story.continued, expected.reports[MIDDLE : MIDDLE + REPLAYED])
    for key, tensor in assembled([expected.end]).items():
        torch.testing.assert_close(end[key], tensor, rtol=1e-4, atol=2e-6, msg=lambda m, key=key: f"{key}: {m}")
    assert middle.keys() == adopted.keys() == end.keys()
    for key, tensor in assembled([expected.middle]).items():
        assert torch.equal(adopted[key], tensor), f"{key} changed on its way through this engine"
