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

Two of the backward's all-gathers collect again what forward did not keep; they run beside a product. A pipeline's ranks
do so for their own layers, and send hidden states and their gradients to the ranks of the neighbouring stages.
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
from megatrain.engine.layout import Layout, resolve_engine
from megatrain.engine.schedules import PipelinePlan
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

    @cached_property
    def local_model(self) -> Stages:
        """What this rank holds, without memory."""
        with torch.device("meta"):
            tp = TensorParallel(self.mesh.axis("tp"), self.layout.cuts_sequence)
            return Stages.build(
                self.spans, partial(self.model.build, n_valid=self.n_valid, seq_len=self.seq_len, tp=tp)
            )


def step_traffic(step: StepShape) -> Tally:
    """All that one rank communicates in a step of plain, fsdp2, or DeepSpeed's stages 1 and 2.

    Raises:
        ValueError: recomputation, or another engine.
    """
    if step.layout.recompute != "none":
        raise ValueError("recomputation is not in these formulas")
    found = Tally()
    for _ in range(step.micro_batches):
        tensor_parallel(step, found)
        context_parallel(step, found)
        pipeline(step, found)
    if step.plan is not None:
        found.add("pp", "all_reduce", FLOAT32)  # the loss
    resolved = resolve_engine(step.layout, step.mesh.size)
    if resolved.engine == "plain":
        gradients_all_reduced(step, found)
    elif resolved.engine == "fsdp2":
        fully_sharded(step, found, resolved.zero)
    elif resolved.zero in (1, 2):
        zero_partitioned(step, found, resolved.zero)
    else:
        raise ValueError("what DeepSpeed gathers ahead in stage 3 is not in these formulas")
    return found


# ------------------------------------------------------------------------------------------------ inside the model


def tensor_parallel(step: StepShape, found: Tally) -> None:
    """Of one micro-batch, forward and backward."""
    if step.tp == 1:
        return
    spans = step.spans.values()
    ends = sum(span.first for span in spans) + sum(span.last for span in spans)
    if step.layout.cuts_sequence:  # at the ends: the embeddings and their gradient, the head's input and its gradient
        found.add("tp", "all_gather", step.hidden_bytes, 6 * step.n_layers + ends)
        found.add("tp", "reduce_scatter", step.hidden_bytes, 4 * step.n_layers + ends)
    else:
        found.add("tp", "all_reduce", step.hidden_bytes, 4 * step.n_layers + ends)
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
    head = step.tokens * step.model.width_of_head
    queries, keys = head * (step.model.n_heads // step.tp), head * max(1, step.model.kv_heads // step.tp)
    if step.layout.cp_kind == "ring":
        found.add("cp", "all_to_all", 2 * keys * step.element, 2 * (size - 1) * layers)
        found.add("cp", "all_to_all", 2 * keys * FLOAT32, size * layers)
    else:
        found.add("cp", "all_to_all", queries * step.element, 4 * layers)  # queries and the output, both ways
        found.add("cp", "all_to_all", keys * step.element, 4 * layers)


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


def gradients_all_reduced(step: StepShape, found: Tally) -> None:
    """The plain engine, once a step: counts of tokens, gradients, the norm, the loss."""
    parameters = list(step.local_model.parameters())
    _sums_of_parts(step, parameters, found, 1)
    _norm(step, found, ("tp", "pp"))
    tied_ends(step, found, 1)
    if step.mesh.axis("data").size > 1:
        found.add("data", "all_reduce", FLOAT32, 2)
        for elements in _buckets([p.numel() for p in parameters]):
            found.add("data", "all_reduce", elements * FLOAT32)


def zero_partitioned(step: StepShape, found: Tally, zero: int) -> None:
    """DeepSpeed's stages 1 and 2, where gradients fill one bucket and partitions are equal.

    Both sum whole gradients, stage 2 those of every micro-batch; then each group of the optimiser is gathered.
    """
    parameters = list(step.local_model.parameters())
    rounds = step.micro_batches if zero == 2 else 1
    found.add("data", "all_reduce", sum(p.numel() for p in parameters) * FLOAT32, rounds)
    for group in ([p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim == 1]):
        found.add("data", "all_gather", sum(p.numel() for p in group) * FLOAT32)
    found.add("data", "all_reduce", FLOAT32, 2)
    _norm(step, found, ("data", "tp"))
    if zero == 1:
        _sums_of_parts(step, parameters, found, 1)
    for p in parameters if zero == 2 else ():  # in backward, one by one, before DeepSpeed takes them
        for _ in range(step.micro_batches):
            _sums_of_parts(step, [p], found, 1)


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


def _buckets(sizes: list[int]) -> list[int]:
    """Elements of each bucket that the plain engine reduces."""
    found: list[int] = []
    for n in sizes:
        if not found or found[-1] >= BUCKET_ELEMENTS:
            found.append(0)
        found[-1] += n
    return found
