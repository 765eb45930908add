"""How a model and a batch are spread over ranks: the run file's `layout` section, and what is legal in it."""

from dataclasses import dataclass
from typing import Any, Literal

from megatrain.base.errors import LayoutError, did_you_mean
from megatrain.engine.api import ENGINE, EngineCase, Precision
from megatrain.engine.schedules import SCHEDULES, PipelinePlan, PipelineSchedule, stage_problems
from megatrain.models.stages import Costs, balanced
from megatrain.nn.context import CONTEXT
from megatrain.parallel.mesh import Mesh, divisors

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the mesh axes and the engine. The layout changes how fast a run is, never what it computes."""

    engine: str = AUTO
    """auto is plain for one data-parallel rank, where sharding has nothing to gain, and deepspeed for more."""
    tp: int = 1
    """Tensor-parallel ranks, each with a part of every layer."""
    pp: int = 1
    """Pipeline stages."""
    cp: int = 1
    """Context-parallel ranks, each with a part of every sequence."""
    cp_kind: str = "ring"
    """How they attend together. ring: keys and values travel from rank to rank; ulysses: tokens are exchanged for
    heads, which takes fewer messages and needs as many heads as ranks."""
    ep: int = 1
    """Expert-parallel ranks, each with some of the experts."""
    dp: int | None = None
    """Data-parallel ranks: those that tp, pp and cp leave, and if given it must be that number."""
    zero: int | None = None
    """Stage of ZeRO: 1 under deepspeed, 2 under fsdp2, else 0."""
    schedule: str = "1f1b"
    """In which order pipeline ranks run micro-batches: gpipe, 1f1b, interleaved, looped_bfs, interleaved_zero_bubble,
    zbv or dualpipev."""
    virtual: int | None = None
    """Stages that each pipeline rank holds; by default what the schedule is made for, 1 or 2."""
    stages: Literal["auto"] | tuple[int, ...] = "auto"
    """Layers of each pipeline stage, in the order of the model; auto makes the costliest stage cost least."""
    sequence_parallel: bool | None = None
    """Activations between layers are cut over tp; by default where tp > 1."""
    micro_batch: int = 1
    """Sequences that a rank sees in one pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: Literal["auto", True, False] = "auto"
    """Compile each block with torch.compile; auto does so on a GPU, where it pays at any size."""
    recompute: str = "none"
    """What is computed again in backward rather than kept: none, norms (what they give, in compiled blocks),
    elementwise (that and the activation of feed-forwards), selective (attention), full (every block), or numbers of
    blocks: 0-3, 0-3,8 or 0-30:2 (every second one), or a shell pattern over them."""

    def problems(self) -> list[str]:
        sizes = {name: getattr(self, name) for name in ("tp", "pp", "cp", "ep", "dp", "micro_batch")}
        found = [f"{name}={n}: it must be at least 1" for name, n in sizes.items() if n is not None and n < 1]
        found += [
            f"{name}={sizes[name]}: only {name}=1 can be run so far, use tp, cp, pp and dp"
            for name in ("ep",)
            if sizes[name] > 1
        ]
        if self.schedule not in SCHEDULES:
            found.append(f"schedule is {self.schedule!r}: {did_you_mean(self.schedule, SCHEDULES)}")
        if self.recompute == "norms" and self.compile is False:
            found.append(
                "recompute=norms is for compiled blocks and compile is false: set compile=true, or recompute=none"
            )
        if self.virtual is not None and self.virtual < 1:
            found.append(f"virtual={self.virtual}: it must be at least 1")
        if self.pp == 1:
            found += [
                f"{name}={value} is for a pipeline and pp is 1: leave it out, or set pp to 2 or more"
                for name, value in {"virtual": self.virtual, "stages": self.listed_stages}.items()
                if value is not None
            ]
        if self.engine != AUTO and self.engine not in ENGINE:
            found.append(
                f"engine is {self.engine!r}, which is no engine: {did_you_mean(self.engine, [AUTO, *ENGINE.kinds()])}"
            )
        if self.cp_kind not in CONTEXT:
            found.append(f"cp_kind is {self.cp_kind!r}: {did_you_mean(self.cp_kind, CONTEXT.kinds())}")
        if self.zero not in (None, 0, 1, 2, 3):
            found.append(f"zero={self.zero} is no stage of ZeRO: pick 0, 1, 2 or 3")
        return found

    def compiles(self, device_kind: str) -> bool:
        return device_kind == "cuda" if self.compile == "auto" else self.compile

    @property
    def cuts_sequence(self) -> bool:
        """Activations between layers are cut over tensor-parallel ranks."""
        return self.tp > 1 and self.sequence_parallel is not False

    @property
    def fewest_ranks(self) -> int:
        """What tp, pp, cp and a given dp ask for."""
        return self.tp * self.pp * self.cp * (self.dp or 1)

    @property
    def listed_stages(self) -> tuple[int, ...] | None:
        """The layer counts that are given; None where they are chosen."""
        return None if isinstance(self.stages, str) else self.stages

    @property
    def pipeline_schedule(self) -> PipelineSchedule:
        return SCHEDULES[self.schedule]

    @property
    def stages_a_rank(self) -> int:
        return self.virtual or self.pipeline_schedule.default_virtual

    def pipeline(self, costs: Costs) -> PipelinePlan | None:
        """Schedule and stages of a model of these costs; None where there is no pipeline."""
        if self.pp == 1:
            return None
        counts = self.listed_stages or tuple(balanced(costs, self.pp * self.stages_a_rank))
        return PipelinePlan(self.pipeline_schedule, self.pp, self.stages_a_rank, counts)

    def context(self, mesh: Mesh) -> Any:
        """How the ranks of the cp axis attend together, for this rank of `mesh`."""
        return CONTEXT[self.cp_kind](mesh.axis("cp"))

    def mesh(self, world: int) -> Mesh:
        """The mesh of `world` ranks.

        Raises:
            LayoutError: the sizes do not multiply to `world`.
        """
        if problems := world_problems(self, world):
            raise LayoutError(problems)
        dp = world // (self.tp * self.pp * self.cp)
        return Mesh.of(pp=self.pp, dp=dp, cp=self.cp, tp=self.tp, ep=self.ep)


@dataclass(frozen=True)
class Resolved:
    """The engine that a layout comes down to on a number of ranks."""

    engine: str
    zero: int


def resolve_engine(layout: Layout, world: int) -> Resolved:
    """The engine and the ZeRO stage of `layout` on `world` ranks, defaults filled in.

    Raises:
        LayoutError: the layout has no mesh of `world` ranks.
    """
    mesh = layout.mesh(world)
    alone = mesh.axis("data").size == 1
    engine = layout.engine
    if engine == AUTO:
        engine = "plain" if alone and not layout.zero else "deepspeed"
    zero = layout.zero
    if zero is None:
        zero = 2 if engine == "fsdp2" else 1 if engine == "deepspeed" and not alone else 0
    return Resolved(engine, zero)


def world_problems(layout: Layout, world: int) -> list[str]:
    """Why `layout` cannot fill `world` ranks."""
    model = layout.tp * layout.pp * layout.cp
    product = f"tp x pp x cp = {layout.tp} x {layout.pp} x {layout.cp} = {model}"
    if world % model:
        fits = [tp for tp in divisors(world) if world % (tp * layout.pp * layout.cp) == 0]
        return [
            f"layout: {product} does not divide the {world} ranks of this run: start a multiple of {model} ranks, or "
            + (f"pick tp from {fits}" if fits else f"make pp x cp a divisor of {world}")
        ]
    dp = world // model
    if layout.dp not in (None, dp):
        return [
            f"layout.dp={layout.dp}, but {world} ranks / ({product}) = {dp}: leave dp out, "
            f"or start {layout.dp * model} ranks"
        ]
    return []


def layout_problems(
    layout: Layout,
    world: int,
    global_batch: int,
    *,
    seq_len: int | None = None,
    precision: Precision = Precision(),  # noqa: B008 (a frozen value)
    n_layers: int | None = None,
    tied: bool = False,
) -> list[str]:
    """Why a run cannot be laid out so, in sentences that show the arithmetic.

    Models say for themselves how they can be cut over tp.

    Args:
        world: ranks of the run.
        global_batch: sequences of a step, over all ranks.
        seq_len: tokens of a sequence.
        n_layers: of the model; stages are not checked without.
        tied: the model's head is its embedding.
    """
    found = world_problems(layout, world)
    if found:
        return found
    mesh = layout.mesh(world)
    dp = mesh.axis("dp").size
    if global_batch % dp:
        found.append(
            f"train.global_batch={global_batch} does not divide over dp={dp} (= {world} ranks / (tp {layout.tp} x pp "
            f"{layout.pp} x cp {layout.cp})): "
            f"use a multiple of {dp}, or pick dp from {divisors(global_batch)}"
        )
    elif (rows := global_batch // dp) % layout.micro_batch == 0:
        found += pipeline_problems(layout, rows // layout.micro_batch, n_layers)
    else:
        found.append(
            f"layout.micro_batch={layout.micro_batch} does not divide the {rows} sequences that each rank has "
            f"(train.global_batch {global_batch} / dp {dp}): pick it from {divisors(rows)}"
        )
    uncut = [] if seq_len is None else CONTEXT[layout.cp_kind].length_problems(seq_len, layout.cp)
    found += uncut
    if not uncut and layout.cuts_sequence and seq_len is not None and (seq_len // layout.cp) % layout.tp:
        found.append(
            f"data.seq_len={seq_len} / cp {layout.cp} cannot be cut over tp={layout.tp}: pick tp from "
            f"{divisors(seq_len // layout.cp)}, "
            "or set layout.sequence_parallel=false"
        )
    resolved = resolve_engine(layout, world)
    schedule = layout.pipeline_schedule if layout.pp > 1 else None
    case = EngineCase(zero=resolved.zero, pp=layout.pp, precision=precision, schedule=schedule, tied=tied)
    return found + ENGINE[resolved.engine]().unsupported_reasons(case)


def pipeline_problems(layout: Layout, n_micro_batches: int, n_layers: int | None) -> list[str]:
    """Why the schedule of `layout` cannot run so many micro-batches a step, or so many layers make no such stages."""
    if layout.pp == 1:
        return []
    schedule, v = layout.pipeline_schedule, layout.stages_a_rank
    found = schedule.problems(layout.schedule, layout.pp, n_micro_batches, v)
    if n_layers is not None and schedule.virtual(v):
        found += stage_problems(n_layers, layout.pp, v, layout.listed_stages)
    return found
