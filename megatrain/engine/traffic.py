"""What a step of a decoder communicates, in closed form: calls and bytes by axis and operation, of one rank.

A test counts real steps and finds the same. Bytes are those of the whole tensor that is reduced, gathered, dealt out or
exchanged (`audit.communication.Traffic`); how many of them cross a wire depends on the algorithm.

Per layer and micro-batch, with A the bytes of its hidden states [b, t, d] over this context-parallel rank's tokens:

| axis | forward | backward |
|---|---|---|
| tp, sequence parallel | 2 all-gathers, 2 reduce-scatters of A | 4 all-gathers, 2 reduce-scatters of A |
| tp, else | 2 all-reduces of A | 2 all-reduces of A |
| cp, ring | size - 1 shifts of keys and values | the same, and size shifts of their gradients in float32 |
| cp, ulysses | 4 all-to-alls: queries, keys, values, output | the same |

Two of the backward's all-gathers collect again what forward did not keep, beside a product; schedules that leave weight
gradients for later keep it. Recomputation does forward's part again, up to the last tensor that backward needs. A
pipeline's ranks do all this for their own layers, and send hidden states and their gradients to the ranks of the
neighbouring stages.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from megatrain.audit.communication import Traffic
from megatrain.engine.gradients import BUCKET_ELEMENTS
from megatrain.engine.kinds.deepspeed import DeepSpeed
from megatrain.engine.layout import Layout, resolve_engine
from megatrain.engine.schedules import PipelinePlan
from megatrain.models.recompute import SELECTIVE, recomputes
from megatrain.models.stages import Span, Stages
from megatrain.parallel.cross_entropy import chunk_rows
from megatrain.parallel.mesh import Mesh
from megatrain.parallel.shard import shard_of
from megatrain.parallel.tensor import TensorParallel

FLOAT32, FLOAT64 = 4, 8


class Tally(dict[tuple[str, str], Traffic]):
    """Traffic by (axis, operation)."""

    def add(self, axis: str, operation: str, n_bytes: int, calls: int = 1) -> None:
        if calls:
            self[axis, operation] = self.get((axis, operation), Traffic()) + Traffic(1, n_bytes) * calls


@dataclass(frozen=True)
class StepShape:
    """One step of a model under a layout, from what the run file says."""

    model: Any
    """A choice of megatrain.models.decoder."""
    n_valid: int
    seq_len: int
    layout: Layout
    mesh: Mesh
    global_batch: int
    element: int = FLOAT32
    """Bytes of an activation's element, and of a parameter's where it is gathered."""
    device: str = "cpu"

    @property
    def tp(self) -> int:
        return self.mesh.axis("tp").size

    @property
    def micro_batches(self) -> int:
        return self.global_batch // self.mesh.axis("dp").size // self.layout.micro_batch

    @property
    def tokens(self) -> int:
        """Of one micro-batch on this context-parallel rank."""
        return self.layout.micro_batch * self.seq_len // self.mesh.axis("cp").size

    @property
    def hidden_bytes(self) -> int:
        """Of a micro-batch's hidden states, which tensor-parallel ranks hold together or each."""
        return self.tokens * self.model.d_model * self.element

    @cached_property
    def plan(self) -> PipelinePlan | None:
        return self.layout.pipeline(self.model.costs(self.n_valid, self.seq_len))

    @cached_property
    def spans(self) -> dict[int, Span]:
        """The layers of each stage that this rank holds."""
        if self.plan is None:
            return {0: Span(0, self.model.n_layers, self.model.n_layers)}
        return self.plan.spans(self.mesh.axis("pp").rank)

    @property
    def n_layers(self) -> int:
        """On this rank."""
        return sum(span.stop - span.start for span in self.spans.values())

    @property
    def recomputed(self) -> tuple[int, int]:
        """This rank's layers whose attention is computed again in backward, and those of which all is."""
        what = self.layout.recompute
        numbers = [i for span in self.spans.values() for i in range(span.start, span.stop)]
        blocks = sum(recomputes(str(i), what) for i in numbers)
        return (len(numbers) if what == SELECTIVE else blocks), blocks

    @cached_property
    def local_model(self) -> Stages:
        """What this rank holds, without memory."""
        with torch.device("meta"):
            tp = TensorParallel(self.mesh.axis("tp"), self.layout.cuts_sequence)
            return Stages.build(
                self.spans, partial(self.model.build, n_valid=self.n_valid, seq_len=self.seq_len, tp=tp)
            )


def step_traffic(step: StepShape) -> Tally:
    """All that one rank communicates in a step.

    Raises:
        ValueError: a pipeline under DeepSpeed's stage 3, which gathers as it sees micro-batches come.
    """
    found = Tally()
    for _ in range(step.micro_batches):
        tensor_parallel(step, found)
        context_parallel(step, found)
        pipeline(step, found)
    if step.plan is not None:
        found.add("pp", "all_reduce", FLOAT32)  # the loss
    resolved = resolve_engine(step.layout, step.mesh.size)
    if resolved.zero == 0:
        gradients_all_reduced(step, found, BUCKET_ELEMENTS if resolved.engine == "plain" else math.inf)
    elif resolved.engine == "fsdp2":
        fully_sharded(step, found, resolved.zero)
    elif resolved.zero in (1, 2):
        zero_partitioned(step, found, every_pass=resolved.zero == 2 and step.plan is None)
    elif step.plan is None:
        partitioned_by_deepspeed(step, found)
    else:
        raise ValueError("what DeepSpeed's stage 3 gathers under a pipeline's schedule has no closed form here")
    return found


# ------------------------------------------------------------------------------------------------ inside the model


def tensor_parallel(step: StepShape, found: Tally) -> None:
    """Of one micro-batch, forward and backward."""
    if step.tp == 1:
        return
    spans = step.spans.values()
    ends = sum(span.first for span in spans) + sum(span.last for span in spans)
    attentions, blocks = step.recomputed
    # a block's last sum over ranks is done again only where something keeps what comes of it
    kept = step.model.dropout > 0 or step.model.norm.placement in ("post", "output")
    sums = 4 * step.n_layers + blocks * (2 if kept else 1) + ends
    if step.layout.cuts_sequence:  # at the ends: the embeddings and their gradient, the head's input and its gradient
        gathers = 6 if step.plan is None or not step.plan.schedule.splits_backward else 4
        found.add("tp", "all_gather", step.hidden_bytes, gathers * step.n_layers + attentions + blocks + ends)
        found.add("tp", "reduce_scatter", step.hidden_bytes, sums)
    else:
        found.add("tp", "all_reduce", step.hidden_bytes, sums)
    if not any(span.last for span in spans):
        return
    rows = chunk_rows(step.n_valid, step.tp, step.device)
    for start in range(0, step.tokens, rows):
        n = min(rows, step.tokens - start)
        found.add("tp", "all_reduce", n * FLOAT32)  # the largest logit
        found.add("tp", "all_reduce", 2 * n * FLOAT32)  # the sum of exponentials and the target's logit


def context_parallel(step: StepShape, found: Tally) -> None:
    """Of one micro-batch, forward and backward."""
    size, layers = step.mesh.axis("cp").size, step.n_layers
    if size == 1:
        return
    forwards = layers + step.recomputed[0]
    head = step.tokens * step.model.width_of_head
    queries, keys = head * (step.model.n_heads // step.tp), head * max(1, step.model.kv_heads // step.tp)
    if step.layout.cp_kind == "ring":
        found.add("cp", "all_to_all", 2 * keys * step.element, (size - 1) * (forwards + layers))
        found.add("cp", "all_to_all", 2 * keys * FLOAT32, size * layers)
    else:
        found.add("cp", "all_to_all", queries * step.element, 2 * (forwards + layers))  # queries and the output
        found.add("cp", "all_to_all", keys * step.element, 2 * (forwards + layers))


def pipeline(step: StepShape, found: Tally) -> None:
    """Of one micro-batch: hidden states to the next stage, gradients back, where another rank has it."""
    if step.plan is None:
        return
    here = step.mesh.axis("pp").rank
    n_bytes = step.hidden_bytes // (step.tp if step.layout.cuts_sequence else 1)
    for stage in step.spans:
        for neighbour in (stage - 1, stage + 1):
            if 0 <= neighbour < step.plan.n_stages and step.plan.rank_of(neighbour) != here:
                found.add("pp", "send", n_bytes)
                found.add("pp", "recv", n_bytes)


# ------------------------------------------------------------------------------------------------ around the model


def gradients_all_reduced(step: StepShape, found: Tally, bucket: float) -> None:
    """The plain engine and DeepSpeed's stage 0, once a step: counts of tokens, gradients, the norm, the loss."""
    parameters = list(step.local_model.parameters())
    _sums_of_parts(step, parameters, found, 1)
    _norm(step, found, ("tp", "pp"))
    tied_ends(step, found, 1)
    if step.mesh.axis("data").size > 1:
        found.add("data", "all_reduce", FLOAT32, 2)
        for elements in _buckets([p.numel() for p in parameters], bucket):
            found.add("data", "all_reduce", elements * FLOAT32)


def zero_partitioned(step: StepShape, found: Tally, *, every_pass: bool) -> None:
    """DeepSpeed's stages 1 and 2, where gradients fill one bucket and partitions are equal.

    Both sum whole gradients, stage 2 without a pipeline those of every micro-batch; then each group of the optimiser is
    gathered.
    """
    parameters = list(step.local_model.parameters())
    rounds = step.micro_batches if every_pass else 1
    found.add("data", "all_reduce", sum(p.numel() for p in parameters) * FLOAT32, rounds)
    for group in ([p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim == 1]):
        found.add("data", "all_gather", sum(p.numel() for p in group) * step.element)
    found.add("data", "all_reduce", FLOAT32, 2)
    _norm(step, found, ("data", "tp", "pp"))
    tied_ends(step, found, 1)
    if every_pass:
        _sums_in_backward(step, parameters, found)
    else:
        _sums_of_parts(step, parameters, found, 1)


def partitioned_by_deepspeed(step: StepShape, found: Tally) -> None:
    """Its stage 3, for models of which all is gathered in one go: a pass keeps it from forward to backward.

    Parameters that are small stay whole, and are gathered one by one after the optimiser's step.
    """
    parameters = list(step.local_model.parameters())
    small = [p.numel() for p in parameters if p.numel() < DeepSpeed.persistent_below]
    whole = sum(p.numel() for p in parameters)
    found.add("data", "reduce_scatter", whole * FLOAT32, step.micro_batches)
    if whole > sum(small):
        found.add("data", "all_gather", (whole - sum(small)) * step.element, step.micro_batches)
    for n in small:
        found.add("data", "all_gather", n * step.element)
    found.add("data", "all_reduce", FLOAT32, 2)
    _norm(step, found, ("data", "tp"))
    _sums_in_backward(step, parameters, found)


def fully_sharded(step: StepShape, found: Tally, zero: int) -> None:
    """The fsdp2 engine: a block's parameters are gathered for each micro-batch, their gradients dealt out once."""
    data = step.mesh.axis("data").size
    gathers = step.micro_batches if step.plan is None else 1  # a stage keeps them from its first forward on
    for _, stage in step.local_model.stages:
        model: Any = stage
        blocks = [list(block.parameters()) for block in model.layers.values()]
        inside = {id(p) for block in blocks for p in block}
        rest = [p for p in model.parameters() if id(p) not in inside]
        for i, group in enumerate([*blocks, rest] if rest else blocks):
            elements = sum(-(-p.shape[0] // data) * data * math.prod(p.shape[1:]) for p in group)
            again = 2 if zero == 3 and i < len(blocks) else 1  # blocks are dropped after forward, the rest is not
            found.add("data", "all_gather", elements * step.element, again * gathers)
            found.add("data", "reduce_scatter", elements * FLOAT32)
    _sums_of_parts(step, list(step.local_model.parameters()), found, data)
    tied_ends(step, found, data)
    if data > 1:
        found.add("data", "all_reduce", FLOAT32, 2)
    _norm(step, found, ("data", "tp", "pp"))


def tied_ends(step: StepShape, found: Tally, data: int) -> None:
    """The ranks at both ends of a pipeline swap their gradients of the embedding, 1 / `data` of its rows each."""
    first, last = (any(getattr(span, end) for span in step.spans.values()) for end in ("first", "last"))
    if step.model.tie_embeddings and first != last:
        elements = dict(step.local_model.named_parameters())["embedding.weight"].numel() // data
        found.add("pp", "send", elements * FLOAT32)
        found.add("pp", "recv", elements * FLOAT32)


def _norm(step: StepShape, found: Tally, axes: tuple[str, ...]) -> None:
    for axis in axes:
        if step.mesh.axis(axis).size > 1:
            found.add(axis, "all_reduce", FLOAT64)


def _sums_of_parts(step: StepShape, parameters: list[nn.Parameter], found: Tally, data: int) -> None:
    """Gradients of which each tensor-parallel rank has a part; this rank holds 1 / `data` of the rows of each."""
    elements: Counter[int] = Counter()
    for p in parameters:
        shard = shard_of(p)
        inner = math.prod(p.shape[shard.dim + 1 :])
        for part in shard.parts:
            sharers = step.tp if shard.summed_over_tp else part.shared
            if sharers > 1:
                elements[sharers] += (part.stop - part.start) * inner // data
    for sharers, n in elements.items():
        if sharers == step.tp:
            found.add("tp", "all_reduce", n * FLOAT32)
        else:
            found.add("tp", "all_to_all", n * sharers * FLOAT32)


def _sums_in_backward(step: StepShape, parameters: list[nn.Parameter], found: Tally) -> None:
    """One by one with every micro-batch, before DeepSpeed takes them."""
    for p in parameters:
        for _ in range(step.micro_batches):
            _sums_of_parts(step, [p], found, 1)


def _buckets(sizes: list[int], full: float) -> list[int]:
    """Elements of each bucket that is reduced; one is closed when it holds `full` elements."""
    found: list[int] = []
    for n in sizes:
        if not found or found[-1] >= full:
            found.append(0)
        found[-1] += n
    return found
