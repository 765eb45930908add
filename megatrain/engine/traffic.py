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

Two of the backward's all-gathers collect again what forward did not keep; they run beside a product.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatrain.audit.communication import Traffic
from megatrain.engine.gradients import BUCKET_ELEMENTS
from megatrain.engine.layout import Layout, resolve_engine
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
    """Bytes of an activation's element."""
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

    def local_model(self) -> nn.Module:
        """What this rank holds, without memory."""
        with torch.device("meta"):
            tp = TensorParallel(self.mesh.axis("tp"), self.layout.cuts_sequence)
            return self.model.build(n_valid=self.n_valid, seq_len=self.seq_len, tp=tp)


def step_traffic(step: StepShape) -> Tally:
    """All that one rank communicates in a step of plain, fsdp2, or DeepSpeed's stages 1 and 2.

    Raises:
        ValueError: a pipeline, recomputation, or another engine.
    """
    if step.mesh.axis("pp").size > 1 or step.layout.recompute != "none":
        raise ValueError("a pipeline and recomputation are not in these formulas")
    found = Tally()
    for _ in range(step.micro_batches):
        tensor_parallel(step, found)
        context_parallel(step, found)
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
    hidden, layers = step.tokens * step.model.d_model * step.element, step.model.n_layers
    if step.layout.cuts_sequence:
        found.add("tp", "all_gather", hidden, 6 * layers + 2)  # the head's input, and the embedding's gradient
        found.add("tp", "reduce_scatter", hidden, 4 * layers + 2)
    else:
        found.add("tp", "all_reduce", hidden, 4 * layers + 2)
    rows = chunk_rows(step.n_valid, step.tp, step.device)
    for start in range(0, step.tokens, rows):
        n = min(rows, step.tokens - start)
        found.add("tp", "all_reduce", n * FLOAT32)  # the largest logit
        found.add("tp", "all_reduce", 2 * n * FLOAT32)  # the sum of exponentials and the target's logit


def context_parallel(step: StepShape, found: Tally) -> None:
    """Of one micro-batch, forward and backward."""
    size, layers = step.mesh.axis("cp").size, step.model.n_layers
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


# ------------------------------------------------------------------------------------------------ around the model


def gradients_all_reduced(step: StepShape, found: Tally) -> None:
    """The plain engine, once a step: counts of tokens, gradients, the norm, the loss."""
    parameters = list(step.local_model().parameters())
    _sums_of_parts(step, parameters, found, 1)
    if step.tp > 1:
        found.add("tp", "all_reduce", FLOAT64)
    if step.mesh.axis("data").size > 1:
        found.add("data", "all_reduce", FLOAT32, 2)
        for elements in _buckets([p.numel() for p in parameters]):
            found.add("data", "all_reduce", elements * FLOAT32)


def zero_partitioned(step: StepShape, found: Tally, zero: int) -> None:
    """DeepSpeed's stages 1 and 2, where gradients fill one bucket and partitions are equal.

    Both sum whole gradients, stage 2 those of every micro-batch; then each group of the optimiser is gathered.
    """
    parameters = list(step.local_model().parameters())
    rounds = step.micro_batches if zero == 2 else 1
    found.add("data", "all_reduce", sum(p.numel() for p in parameters) * FLOAT32, rounds)
    for group in ([p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim == 1]):
        found.add("data", "all_gather", sum(p.numel() for p in group) * FLOAT32)
    found.add("data", "all_reduce", FLOAT32, 2)
    found.add("data", "all_reduce", FLOAT64)
    if step.tp > 1:
        found.add("tp", "all_reduce", FLOAT64)
    if zero == 1:
        _sums_of_parts(step, parameters, found, 1)
    for p in parameters if zero == 2 else ():  # in backward, one by one, before DeepSpeed takes them
        for _ in range(step.micro_batches):
            _sums_of_parts(step, [p], found, 1)


def fully_sharded(step: StepShape, found: Tally, zero: int) -> None:
    """The fsdp2 engine: a block's parameters are gathered for each micro-batch, their gradients dealt out once."""
    model: Any = step.local_model()
    data = step.mesh.axis("data").size
    in_blocks = {id(p) for block in model.layers.values() for p in block.parameters()}
    rest = [p for p in model.parameters() if id(p) not in in_blocks]
    groups = [list(block.parameters()) for block in model.layers.values()]
    for i, group in enumerate([*groups, rest]):
        n_bytes = sum(-(-p.shape[0] // data) * data * math.prod(p.shape[1:]) for p in group) * FLOAT32
        again = 2 if zero == 3 and i < len(groups) else 1  # blocks are dropped after forward, the rest is not
        found.add("data", "all_gather", n_bytes, again * step.micro_batches)
        found.add("data", "reduce_scatter", n_bytes)
    _sums_of_parts(step, list(model.parameters()), found, data)
    if data > 1:
        found.add("data", "all_reduce", FLOAT32, 2)
        found.add("data", "all_reduce", FLOAT64)
    if step.tp > 1:
        found.add("tp", "all_reduce", FLOAT64)


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
