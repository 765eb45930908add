"""A run's engine and feed on one rank of a mesh: what training and verifying share."""

from collections.abc import Iterator
from typing import Any, Self

from megatrain.base.device import Device
from megatrain.data.feed import Feed
from megatrain.data.shards import TokenizerEntry
from megatrain.engine.api import ENGINE, Engine, Parts
from megatrain.engine.layout import resolve_engine
from megatrain.models.recompute import SELECTIVE, recompute
from megatrain.nn.batch import Batch
from megatrain.parallel.mesh import Axis, Mesh
from megatrain.parallel.shard import initialise
from megatrain.parallel.tensor import TensorParallel
from megatrain.train.config import Run


def build_engine(run: Run, tokenizer: TokenizerEntry, mesh: Mesh, device: Device) -> Engine:
    """The engine around a freshly drawn model. All ranks call it together."""
    resolved = resolve_engine(run.layout, mesh.size)
    tp = TensorParallel(mesh.axis("tp"), run.layout.cuts_sequence)
    cp = mesh.axis("cp")
    model = run.model.build(n_valid=tokenizer.vocab_size, seq_len=run.data.seq_len, tp=tp, cp=cp, seed=run.seed)
    initialise(model, run.seed)
    inside = run.layout.recompute == SELECTIVE  # a part of the block, so the compiler must see it
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
    )
    return ENGINE[resolved.engine]().build(parts)


class ContextFeed(Iterator[Batch]):
    """A feed of which this rank computes some of the tokens of each row."""

    def __init__(self, feed: Feed, cp: Axis):
        self.feed, self.cp = feed, cp

    def __next__(self) -> Batch:
        return context_part(next(self.feed), self.cp)

    def close(self) -> None:
        self.feed.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def context_part(batch: Batch, cp: Axis) -> Batch:
    """The batch as this context-parallel rank computes it."""
    return batch.context_part(*cp.part(batch.tokens.shape[1], "data.seq_len"))


def open_feed(run: Run, mesh: Mesh, device: Device, cursors: dict[str, Any] | None = None) -> ContextFeed:
    """This rank's rows of each global batch, from `cursors` on."""
    dp = mesh.axis("dp")
    feed = Feed.open(
        run.data,
        seed=run.seed,
        global_batch=run.train.global_batch,
        dp_rank=dp.rank,
        dp_size=dp.size,
        cursors=cursors,
        pin_memory=device.kind == "cuda",
    )
    return ContextFeed(feed, mesh.axis("cp"))
