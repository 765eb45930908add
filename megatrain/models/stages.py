"""A model cut into pipeline stages: which layers each has, and the stages of one rank seen as one model."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Span:
    """The consecutive layers [start, stop) of `n_layers` that a stage has.

    The first stage embeds the tokens too, the last one has the head and its loss.
    """

    start: int
    stop: int
    n_layers: int

    @property
    def first(self) -> bool:
        return self.start == 0

    @property
    def last(self) -> bool:
        return self.stop == self.n_layers


def spans_of(counts: Sequence[int]) -> list[Span]:
    """The span of each stage, from how many layers each has."""
    stops = list(itertools.accumulate(counts))
    return [Span(stop - n, stop, stops[-1]) for n, stop in zip(counts, stops, strict=True)]


@dataclass(frozen=True)
class Costs:
    """Relative cost of a training step by part of the model, for cutting it into stages of equal cost."""

    layers: tuple[float, ...]
    before: float = 0.0
    """Of what the first stage has besides its layers."""
    after: float = 0.0
    """Of what the last stage has besides its layers."""

    def of(self, span: Span) -> float:
        """Of one stage."""
        found = sum(self.layers[span.start : span.stop])
        return found + self.before * span.first + self.after * span.last


def balanced(costs: Costs, n_stages: int) -> list[int]:
    """How many consecutive layers each stage gets so that the costliest stage costs least; at least one each.

    Of equally good cuts, the one whose stages differ least (by the sum of their squared costs). Exact, by dynamic
    programming over (stages so far, layers so far).

    Raises:
        ValueError: fewer layers than stages.
    """
    n = len(costs.layers)
    if n < n_stages:
        raise ValueError(f"{n} layers cannot make {n_stages} stages of at least one layer")
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}  # by layers so far
    for stage in range(1, n_stages + 1):
        stops = range(stage, n - (n_stages - stage) + 1) if stage < n_stages else [n]
        found = {}
        for stop in stops:
            tries = []
            for start, (worst, squares, counts) in best.items():
                if start < stop:
                    cost = costs.of(Span(start, stop, n))
                    tries.append((max(worst, cost), squares + cost * cost, [*counts, stop - start]))
            found[stop] = min(tries, key=lambda t: t[:2])
        best = found
    return best[n][2]


class Stages(nn.Module):
    """The stages that one rank holds, as one model: their parts under the names of the undivided model.

    It is never called itself. `stages` holds the modules that are, by their number in the pipeline.
    """

    layers: nn.ModuleDict
    """All blocks of this rank, by their number in the undivided model."""

    def __init__(self, stages: dict[int, nn.Module]):
        super().__init__()
        self.stages = list(stages.items())  # in a list, so that torch does not give their parts a second name
        self.layers = nn.ModuleDict()
        for _, stage in self.stages:
            for name, part in stage.named_children():
                if name == "layers":
                    self.layers.update(part.items())  # type: ignore[operator]
                else:
                    setattr(self, name, part)

    @classmethod
    def build(cls, spans: Mapping[int, Span], build: Callable[..., nn.Module]) -> "Stages":
        """The stages of these spans, by number; `build` is given each, and the first stage where that is among them."""
        stages: dict[int, nn.Module] = {}
        for number, span in spans.items():
            stages[number] = build(span=span, first=stages.get(0))
        return cls(stages)

    def compile_blocks(self, backend: str = "inductor") -> None:
        stage: Any
        for _, stage in self.stages:
            stage.compile_blocks(backend)

    def train(self, mode: bool = True) -> "Stages":
        for _, stage in self.stages:
            stage.train(mode)
        return super().train(mode)
