"""The pipeline schedules: in which order a rank runs the micro-batches of the stages that it holds.

They are torch's own (`engine.pipeline` runs them); this table says what each is, what it asks for, and how much of a
step it leaves idle. To add one, add an entry.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from megatrain.models.stages import Span, spans_of
from megatrain.parallel.mesh import divisors


@dataclass(frozen=True, kw_only=True)
class PipelineSchedule:
    """One schedule. p ranks run m micro-batches through v stages each."""

    torch_name: str
    """Its name in torch.distributed.pipelining."""
    paper: str
    virtual: Callable[[int], bool]
    """Which v it can run."""
    default_virtual: int = 1
    virtual_words: str = "1"
    """Which v it can run, in words."""
    placement: Literal["loop", "v"] = "loop"
    """loop: rank r has stages r, r + p, r + 2p, ...; v: rank r has stages r and 2p - 1 - r, so rank 0 the last too."""
    splits_backward: bool = False
    """It runs the gradients of weights apart from those of inputs, wherever that fills a gap."""
    least: Literal[0, 1, 2] = 0
    """Micro-batches that it needs at least, as a multiple of p."""
    in_rounds: bool = False
    """It takes micro-batches in rounds of p, stretched so that a round is at least that long."""
    idle: Callable[[int, int], int]
    """Units of time that each rank is idle in a step, from (p, m), where m >= p and m is what it asks for.

    A unit is the forward of one stage; so is the gradient of its inputs, and so is that of its weights.
    """

    def bubble_share(self, p: int, m: int, v: int) -> Fraction:
        """Share of a step that each rank is idle: its work is 3 m v units."""
        idle = self.idle(p, m)
        return Fraction(idle, idle + 3 * m * v)

    def stages_of(self, rank: int, p: int, v: int) -> list[int]:
        """Numbers of the stages that `rank` of `p` holds."""
        return [rank, 2 * p - 1 - rank] if self.placement == "v" else [rank + i * p for i in range(v)]

    def problems(self, name: str, p: int, m: int, v: int) -> list[str]:
        """Why it cannot run `m` micro-batches on `p` ranks with `v` stages each."""
        found = []
        if not self.virtual(v):
            found.append(
                f"layout.virtual={v}: schedule {name} runs {self.virtual_words} stages a rank: leave layout.virtual "
                f"out for {self.default_virtual}, or set layout.schedule to one of {runs(v)}"
            )
        if m < self.least * p:
            found.append(
                f"schedule {name} needs at least {'2 x ' if self.least == 2 else ''}pp = {self.least * p} "
                f"micro-batches and a step has {m}: pick a smaller layout.micro_batch or pp, a larger "
                f"train.global_batch, or layout.schedule=gpipe, which runs any number"
            )
        elif self.in_rounds and m % (rounds := max(1, m // p)):
            fits = [n for n in range(1, 4 * m) if n % max(1, n // p) == 0]
            near = [max(n for n in fits if n < m), min(n for n in fits if n > m)]
            found.append(
                f"schedule {name} takes the {m} micro-batches of a step in {m} // pp {p} = {rounds} equal rounds, "
                f"which does not divide: change layout.micro_batch or train.global_batch to make it {near[0]} or "
                f"{near[1]}, or any multiple of {p}"
            )
        return found


def _fill_and_drain(p: int, m: int) -> int:
    """The first micro-batch reaches the last rank after p - 1 forwards; its gradients come back in 2 (p - 1)."""
    return 3 * (p - 1)


def _weights_fill_the_drain(p: int, m: int) -> int:
    """As much work as the drain leaves idle is kept for it: only the fill remains."""
    return p - 1


def _zbv_idle(p: int, m: int) -> int:
    """Below 2p micro-batches there is not enough work to fill the V."""
    return max(p - 1, 2 * (2 * p - 1 - m))


def _one(v: int) -> bool:
    return v == 1


def _two(v: int) -> bool:
    return v == 2


SCHEDULES: dict[str, PipelineSchedule] = {
    "gpipe": PipelineSchedule(
        torch_name="GPipe", paper="Huang et al. 2018, arXiv:1811.06965", virtual=_one, idle=_fill_and_drain
    ),
    "1f1b": PipelineSchedule(
        torch_name="1F1B",
        paper="Narayanan et al. 2019, arXiv:1806.03377",
        virtual=_one,
        least=1,
        idle=_fill_and_drain,
    ),
    "interleaved": PipelineSchedule(
        torch_name="Interleaved1F1B",
        paper="Narayanan et al. 2021, arXiv:2104.04473, section 2.2.2",
        virtual=lambda v: v >= 2,
        virtual_words="2 or more",
        default_virtual=2,
        in_rounds=True,
        idle=_fill_and_drain,
    ),
    "looped_bfs": PipelineSchedule(
        torch_name="LoopedBFS",
        paper="Lamy-Poirier 2022, arXiv:2211.05953",
        virtual=lambda v: v >= 2,
        virtual_words="2 or more",
        default_virtual=2,
        idle=_fill_and_drain,
    ),
    "interleaved_zero_bubble": PipelineSchedule(
        torch_name="InterleavedZeroBubble",
        paper="Qi et al. 2023, arXiv:2401.10241, ZB-H1",
        virtual=lambda v: v >= 1,
        virtual_words="1 or more",
        default_virtual=2,
        splits_backward=True,
        in_rounds=True,
        idle=_weights_fill_the_drain,
    ),
    "zbv": PipelineSchedule(
        torch_name="ZBVZeroBubble",
        paper="Qi et al. 2024, arXiv:2405.15362, ZB-V",
        virtual=_two,
        virtual_words="exactly 2",
        default_virtual=2,
        placement="v",
        splits_backward=True,
        idle=_zbv_idle,
    ),
    "dualpipev": PipelineSchedule(
        torch_name="DualPipeV",
        paper="DeepSeek-AI 2024, arXiv:2412.19437, section 3.2.1, folded into a V",
        virtual=_two,
        virtual_words="exactly 2",
        default_virtual=2,
        placement="v",
        splits_backward=True,
        least=2,
        idle=_weights_fill_the_drain,
    ),
}


def runs(v: int) -> list[str]:
    """Names of the schedules that run `v` stages a rank."""
    return [name for name, schedule in SCHEDULES.items() if schedule.virtual(v)]


# ------------------------------------------------------------------------------------------------ the plan of a layout


@dataclass(frozen=True)
class PipelinePlan:
    """What a layout's pipeline comes down to: its schedule, and how many layers each stage has."""

    schedule: PipelineSchedule
    pp: int
    virtual: int
    layers: tuple[int, ...]
    """Of each stage, in the order of the model."""

    @property
    def n_stages(self) -> int:
        return self.pp * self.virtual

    def stages_of(self, rank: int) -> list[int]:
        return self.schedule.stages_of(rank, self.pp, self.virtual)

    def spans(self, rank: int) -> dict[int, Span]:
        """The layers of each stage that `rank` along pp holds."""
        found = spans_of(self.layers)
        return {stage: found[stage] for stage in self.stages_of(rank)}

    def rank_of(self, stage: int) -> int:
        """The rank along pp that holds `stage`."""
        return next(rank for rank in range(self.pp) if stage in self.stages_of(rank))


def stage_problems(n_layers: int, pp: int, v: int, stages: tuple[int, ...] | None) -> list[str]:
    """Why `n_layers` layers cannot be cut into `pp` x `v` stages, or into the `stages` that are asked for."""
    n_stages, product = pp * v, f"pp {pp} x virtual {v} = {pp * v}"
    if stages is None:
        if n_layers >= n_stages:
            return []
        fits = [p for p in divisors(pp) if p * v <= n_layers and p > 1]
        return [
            f"model.n_layers={n_layers} cannot make {product} stages of at least one layer: set model.n_layers to "
            f"{n_stages} or more, or " + (f"pick pp from {fits}" if fits else f"make pp x virtual at most {n_layers}")
        ]
    found = []
    if len(stages) != n_stages:
        found.append(
            f"layout.stages lists {len(stages)} stages and {product} are run: list that many layer counts, or set auto"
        )
    if empty := [i for i, n in enumerate(stages) if n < 1]:
        found.append(
            f"layout.stages={list(stages)} leaves stage{'s' if len(empty) > 1 else ''} "
            f"{', '.join(map(str, empty))} without a layer: give every stage at least 1"
        )
    if sum(stages) != n_layers:
        counts = " + ".join(map(str, stages))
        found.append(
            f"layout.stages: {counts} = {sum(stages)} layers, and model.n_layers={n_layers}: make them add up to it"
        )
    return found
