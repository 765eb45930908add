"""A run's engine and feed on one rank of a mesh: what training and verifying share."""

from collections.abc import Iterator
from functools import partial
from typing import Any, Self

from megatrain.base.device import Device
from megatrain.base.errors import ConfigError
from megatrain.data.feed import Feed
from megatrain.data.manifest import Manifest, TokenizerEntry
from megatrain.engine.api import ENGINE, Engine, Parts
from megatrain.engine.guard import Guard, Guarded
from megatrain.engine.layout import resolve_engine
from megatrain.engine.schedules import PipelinePlan
from megatrain.models.recompute import INSIDE, recompute
from megatrain.models.stages import Stages
from megatrain.nn.batch import Batch
from megatrain.nn.precision.quantised import Quantised
from megatrain.nn.precision.select import quantise
from megatrain.parallel.mesh import Mesh
from megatrain.parallel.shard import initialise
from megatrain.parallel.tensor import TensorParallel
from megatrain.train.config import Run


def build_engine(run: Run, tokenizer: TokenizerEntry, mesh: Mesh, device: Device) -> Engine:
    """The engine around a freshly drawn model. All ranks call it together."""
    resolved = resolve_engine(run.layout, mesh.size)
    tp = TensorParallel(mesh.axis("tp"), run.layout.cuts_sequence)
    cp = run.layout.context(mesh)
    plan = pipeline_of(run, tokenizer)
    with device.torch:  # a rank's own part only, where it will be: a host has no room for eight whole models
        model = build_model(run, plan, mesh, n_valid=tokenizer.vocab_size, seq_len=run.data.seq_len, tp=tp, cp=cp)
    initialise(model, run.seed)
    products = quantised(run, model, mesh, device)
    inside = run.layout.recompute in INSIDE
    if inside:
        recompute(model.layers, run.layout.recompute)
    if run.layout.compiles(device.kind):
        model.compile_blocks()
    if not inside:
        recompute(model.layers, run.layout.recompute)
    parts = Parts(
        model=model,
        optimizer=run.optimizer,
        mesh=mesh,
        device=device,
        precision=run.precision,
        micro_batch=run.layout.micro_batch,
        zero=resolved.zero,
        pipeline=plan,
    )
    engine: Engine = ENGINE[resolved.engine]().build(parts)
    eight_bits = run.precision.eight_bits
    if eight_bits is None or not eight_bits.guard_every:
        return engine
    guard = Guard(
        products,
        eight_bits.guard_every,
        eight_bits.guard_limit,
        mesh.axis("world"),
        counted=mesh.axis("dp").rank == 0,
    )
    return Guarded(engine, guard, device.torch)


def quantised(run: Run, model: Any, mesh: Mesh, device: Device) -> dict[str, Quantised]:
    """Let layers of `model` multiply in eight bits where the run asks for it; their products by name."""
    eight_bits = run.precision.eight_bits
    if eight_bits is None:
        return {}
    if why_not := eight_bits.card_problem(device.capability()):
        raise ConfigError(why_not)
    fp8 = run.precision.fp8
    if fp8 is not None and fp8.backend != "torch" and run.layout.compiles(device.kind):
        raise ConfigError(
            f"precision.fp8.backend={fp8.backend} cannot be part of a compiled block: set layout.compile=false, "
            "or backend=torch"
        )
    return quantise(model, eight_bits, run.model.n_layers, mesh.axis("tp"), mesh.axis("row"))


def pipeline_of(run: Run, tokenizer: TokenizerEntry) -> PipelinePlan | None:
    """Schedule and stages of the run's model; None where one rank holds all layers."""
    return run.layout.pipeline(run.model.costs(tokenizer.vocab_size, run.data.seq_len))


def build_model(run: Run, plan: PipelinePlan | None, mesh: Mesh, **facts: Any) -> Any:
    """The model, or the stages of it that this rank of a pipeline holds."""
    if plan is None:
        return run.model.build(seed=run.seed, **facts)
    return Stages.build(plan.spans(mesh.axis("pp").rank), partial(run.model.build, seed=run.seed, **facts))


class ContextFeed(Iterator[Batch]):
    """A feed of which this rank computes some of the tokens of each row."""

    def __init__(self, feed: Feed, cp: Any):
        self.feed, self.cp = feed, cp

    def __next__(self) -> Batch:
        return context_part(next(self.feed), self.cp)

    def close(self) -> None:
        self.feed.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def context_part(batch: Batch, cp: Any) -> Batch:
    """The batch as this context-parallel rank computes it; `cp` is a kind of nn.context."""
    return batch.context_part(cp.columns(batch.tokens.shape[1]))


def open_feed(
    run: Run,
    mesh: Mesh,
    device: Device,
    manifests: tuple[Manifest, ...] | None = None,
    cursors: dict[str, Any] | None = None,
) -> ContextFeed:
    """This rank's rows of each global batch, from `cursors` on; `manifests` of the data sets, if they were read."""
    dp = mesh.axis("dp")
    feed = Feed.open(
        run.data,
        seed=run.seed,
        global_batch=run.train.global_batch,
        dp_rank=dp.rank,
        dp_size=dp.size,
        cursors=cursors,
        pin_memory=device.pins_memory,
        manifests=manifests,
    )
    return ContextFeed(feed, run.layout.context(mesh))
