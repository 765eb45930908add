"""Mistakes to plant, one by one: each is what somebody once wrote, or might.

A mutation patches the package in one rank's process for the length of a run. `names` says what a diagnosis must hold to
have found it: the tensor or the collective.
"""

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatrain.engine import gradients
from megatrain.engine.gradients import Gradients
from megatrain.engine.kinds import fsdp2, plain
from megatrain.engine.passes import Passes
from megatrain.engine.pipeline import PipelinePasses
from megatrain.models.decoder import DecoderModel
from megatrain.nn.batch import Batch
from megatrain.nn.context import ring, ulysses
from megatrain.nn.position.rotary import Rotary
from megatrain.optim.kinds.adamw import AdamW
from megatrain.parallel import collectives, cross_entropy
from megatrain.parallel.embedding import VocabParallelEmbedding
from megatrain.parallel.mesh import Axis
from tests.layouts.sides import Mutation

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Planted:
    layout: str
    names: str
    mutate: Mutation


PLANTED: dict[str, Planted] = {}


def planted(layout: str, names: str) -> Any:
    """Register a mutation under the words of its function's name."""

    def add(mutate: Mutation) -> Mutation:
        PLANTED[mutate.__name__] = Planted(layout, names, mutate)
        return mutate

    return add


REPLICATED, SEQUENCE = "tp=2,sequence_parallel=false", "tp=2"
RING, ULYSSES = "cp=2,engine=plain", "cp=2,cp_kind=ulysses,engine=plain"
DATA, SHARDED, STAGES = "dp=2,engine=plain", "dp=2,engine=fsdp2,zero=3", "pp=2"


# ------------------------------------------------------------------------------------------------ tensor parallel


@planted(
    REPLICATED, "output of layers.0.attention (the gathered input of a column-parallel product, or the sum of a row"
)
def outputs_of_a_row_parallel_product_are_not_summed(patch: Patch) -> None:
    whole = collectives.reduce

    def reduce(x: Tensor, axis: Axis) -> Tensor:
        from_embedding = x.grad_fn is not None and "MaskedFill" in type(x.grad_fn).__name__
        return whole(x, axis) if from_embedding else x

    patch.setattr(collectives, "reduce", reduce)


@planted(REPLICATED, "the sum of input gradients behind a column-parallel product, axis tp")
def input_gradients_of_a_column_parallel_product_are_not_summed(patch: Patch) -> None:
    patch.setattr(collectives, "start_all_reduce", lambda x, axis: x)


@planted(REPLICATED, "output of embedding (the sum over the vocabulary's rows, axis tp")
def an_embedding_adds_rows_that_other_ranks_hold(patch: Patch) -> None:
    def forward(self: VocabParallelEmbedding, tokens: Tensor) -> Tensor:
        local = (tokens - self.first).clamp(0, self.weight.shape[0] - 1)
        return self.tp.leave(F.embedding(local, self.weight))

    patch.setattr(VocabParallelEmbedding, "forward", forward)


def _only(patch: Patch, operation: str) -> None:
    over_ranks = cross_entropy._over_ranks
    patch.setattr(
        cross_entropy, "_over_ranks", lambda x, axis, op: over_ranks(x, axis, op) if op == operation else x.clone()
    )


@planted(REPLICATED, "the loss of step 1 (the largest logit and the sums of the vocabulary-parallel loss, axis tp")
def exponentials_are_summed_over_one_ranks_vocabulary(patch: Patch) -> None:
    _only(patch, "max")


@planted(SEQUENCE, "the loss of step 1 (the largest logit and the sums of the vocabulary-parallel loss, axis tp")
def each_rank_subtracts_its_own_largest_logit(patch: Patch) -> None:
    _only(patch, "sum")


@planted(SEQUENCE, "output of embedding (the sum over the vocabulary's rows, axis tp")
def partial_sums_are_dealt_out_unsummed(patch: Patch) -> None:
    patch.setattr(collectives, "scatter", collectives.own_rows)


@planted(SEQUENCE, "output of layers.0.attention (the gathered input of a column-parallel product")
def rows_are_gathered_in_the_wrong_order(patch: Patch) -> None:
    gather = collectives.start_all_gather
    patch.setattr(
        collectives,
        "start_all_gather",
        lambda x, axis: torch.cat(collectives.wait(gather(x, axis)).chunk(axis.size, 1)[::-1], 1),
    )


@planted(SEQUENCE, "the sum of input gradients behind a column-parallel product, axis tp")
def a_rank_keeps_its_own_rows_of_input_gradients(patch: Patch) -> None:
    patch.setattr(collectives, "start_reduce_scatter", collectives.own_rows)


@planted(SEQUENCE, "the sum of input gradients behind a column-parallel product, axis tp")
def input_gradients_are_averaged_instead_of_summed(patch: Patch) -> None:
    scatter = collectives.start_reduce_scatter
    patch.setattr(collectives, "start_reduce_scatter", lambda x, axis: collectives.wait(scatter(x, axis)) / axis.size)


@planted(SEQUENCE, "the sum over ranks of the gradients of copies, axis tp")
def gradients_of_norms_stay_partial(patch: Patch) -> None:
    patch.setattr(plain, "sum_partial", lambda held, tp: None)


@planted(SEQUENCE, "the gradient norm of step 1")
def copies_are_counted_by_every_rank_in_the_norm(patch: Patch) -> None:
    patch.setattr(plain, "counted_and_copies", lambda shard, grad: ([grad], []))


@planted(SEQUENCE, "the gradient norm of step 1")
def the_norm_is_of_one_ranks_shard(patch: Patch) -> None:
    norm = plain.global_norm
    patch.setattr(plain, "global_norm", lambda squared, axes: norm(squared, ()))


@planted("tp=4", "the sum over ranks that hold the same key and value heads, axis tp")
def shared_heads_keep_a_part_of_their_gradient(patch: Patch) -> None:
    patch.setattr(gradients, "_sum_over_neighbours", lambda pieces, axis, n: None)


# ------------------------------------------------------------------------------------------------ context parallel


@planted(RING, "output of embedding_dropout (the numbers of a rank's tokens")
def dropout_counts_tokens_from_a_ranks_first(patch: Patch) -> None:
    numbers = Batch.token_numbers
    patch.setattr(Batch, "token_numbers", lambda self: numbers(self) - (self.columns or ((0, 0),))[0][0])


@planted(RING, "output of layers.0.attention (what ranks of a ring send each other, axis cp)")
def positions_begin_anew_on_every_rank(patch: Patch) -> None:
    prepare = Rotary.prepare

    def local(self: Rotary, positions: Tensor, *rest: Any) -> Any:
        return prepare(self, torch.arange(positions.shape[1]).expand_as(positions), *rest)

    patch.setattr(Rotary, "prepare", local)


@planted(RING, "output of layers.0.attention (what ranks of a ring send each other, axis cp)")
def parts_of_attention_are_averaged(patch: Patch) -> None:
    patch.setattr(ring, "_merge", lambda total, lse, y, part_lse: total.add_(y).div_(2))


@planted(RING, "to_qkv.weight (gradients that ranks of a ring send each other, axis cp")
def gradients_of_keys_do_not_come_home(patch: Patch) -> None:
    backward = ring.attend_part_backward

    def own_only(*args: Any, causal: bool) -> tuple[Tensor, ...]:
        of_q, of_k, of_v = backward(*args, causal=causal)
        return (of_q, of_k, of_v) if causal else (of_q, of_k * 0, of_v * 0)

    patch.setattr(ring, "attend_part_backward", own_only)


@planted(ULYSSES, "output of layers.0.attention (what ranks of a ulysses send each other, axis cp)")
def heads_come_back_in_another_order(patch: Patch) -> None:
    back = ulysses.to_tokens
    patch.setattr(ulysses, "to_tokens", lambda x, axis: back(x.flip(1), axis))


@planted(RING, "the sum of gradients, axis data")
def gradients_are_not_summed_over_context_ranks(patch: Patch) -> None:
    patch.setattr(Gradients, "reduce", lambda self: None)


# ------------------------------------------------------------------------------------------------ data parallel


@planted(DATA, "the sum of gradients, axis data")
def gradients_are_averaged_instead_of_summed(patch: Patch) -> None:
    reduce = Gradients.reduce

    def mean(self: Gradients) -> None:
        reduce(self)
        for flat in self.buffers:
            flat /= self.data.size

    patch.setattr(Gradients, "reduce", mean)


@planted(DATA, "the loss of step 1 (the sums of losses and of token counts, axis data")
def a_rank_divides_by_its_own_count_of_tokens(patch: Patch) -> None:
    patch.setattr(Passes, "global_tokens", lambda self, batch: batch.weights.sum())


@planted(SHARDED, "the sum of gradients, axis data")
def an_average_over_ranks_is_taken_for_a_sum(patch: Patch) -> None:
    passes = Passes.forward_backward
    patch.setattr(
        Passes, "forward_backward", lambda self, batch, divisor, *rest: passes(self, batch, 2 * divisor, *rest)
    )


@planted(SHARDED, "the gradient norm of step 1")
def the_norm_is_of_one_ranks_partition(patch: Patch) -> None:
    norm = fsdp2.global_norm
    patch.setattr(fsdp2, "global_norm", lambda squared, axes: norm(squared, ()))


@planted(SHARDED, "after step 1 (the optimiser's step, or what ranks gather after it")
def one_rank_does_not_step(patch: Patch) -> None:
    build = AdamW.build

    def idle(self: AdamW, *args: Any, **options: Any) -> torch.optim.Optimizer:
        optimizer: Any = build(self, *args, **options)
        if dist.get_rank() == 1:
            step = optimizer.step

            @functools.wraps(step)
            def forgets(*_: Any) -> None:
                kept = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
                step()
                with torch.no_grad():
                    for p, before in zip((p for g in optimizer.param_groups for p in g["params"]), kept, strict=True):
                        p.copy_(before)

            optimizer.step = forgets
        return optimizer

    patch.setattr(AdamW, "build", idle)


# ------------------------------------------------------------------------------------------------ pipelines


@planted(STAGES, "the sum over its copies on the first and the last stage, axis pp")
def a_tied_weight_is_not_summed(patch: Patch) -> None:
    patch.setattr(PipelinePasses, "sum_tied", lambda self, found: None)


@planted(STAGES, "gradients that stages send each other, axis pp")
def a_stage_drops_the_gradient_of_its_input(patch: Patch) -> None:
    hidden = DecoderModel.hidden

    def deaf(self: DecoderModel, tokens: Tensor, where: Any, before: Tensor | None = None) -> Tensor:
        if before is not None and before.requires_grad:
            before = before * 1.0
            before.register_hook(torch.zeros_like)
        return hidden(self, tokens, where, before)

    patch.setattr(DecoderModel, "hidden", deaf)
