"""The whole decoder cut over tensor-parallel ranks against one process: loss, every gradient, the norm, the start."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatrain.engine.gradients import gradients_of, sum_partial
from megatrain.models.decoder import Decoder
from megatrain.nn.attention.causal import Causal
from megatrain.nn.attention.sliding_window import SlidingWindow
from megatrain.nn.batch import Batch
from megatrain.nn.feed_forward.geglu import GeGLU
from megatrain.nn.feed_forward.gelu import GELU
from megatrain.nn.norm.layer_norm import LayerNorm
from megatrain.nn.norm.rms_norm import RMSNorm
from megatrain.nn.norm.zero_centred_rms_norm import ZeroCentredRMSNorm
from megatrain.nn.position.learned import Learned
from megatrain.nn.position.none import NoPosition
from megatrain.nn.position.rotary import Rotary
from megatrain.optim.norm import counted_and_copies, global_norm, squared_norm
from megatrain.parallel.mesh import Axis, Mesh
from megatrain.parallel.shard import initialise, shard_of
from megatrain.parallel.tensor import TensorParallel
from tests.contract import batch, error
from tests.ranks import run

N_VALID, SEQ_LEN = 37, 12  # the vocabulary divides by nothing
PACKED = batch((5, 7), (12,), (1, 2, 9), vocab_size=N_VALID, step=3)
WHOLE = batch((12,), (12,), vocab_size=N_VALID)


def decoder(**choices: Any) -> Decoder:
    sizes = {"d_model": 24, "n_layers": 2, "n_heads": 6, "n_kv_heads": 6, "head_dim": 8, "d_ff": 36}
    return Decoder(**(sizes | choices))


CHOICES = {
    "llama": decoder(tie_embeddings=False),
    "padded": decoder(vocab_size=44, tie_embeddings=False),
    "gpt": decoder(
        position=Learned(), norm=LayerNorm(), feed_forward=GELU(bias=True), attention=Causal(bias=True), dropout=0.2
    ),
    "2017": decoder(position=Learned(), norm=LayerNorm(placement="post"), feed_forward=GELU(bias=True)),
    "post": decoder(norm=RMSNorm(placement="post"), tie_embeddings=False),
    "gpt-neox": decoder(
        norm=LayerNorm(placement="parallel"), position=Rotary(share=0.25), feed_forward=GELU(bias=True),
        attention=Causal(bias=True), tie_embeddings=False, dropout=0.1,
    ),
    "gemma": decoder(norm=ZeroCentredRMSNorm(), feed_forward=GeGLU(), scale_embeddings=True),
    "olmo2": decoder(norm=RMSNorm(placement="output"), attention=Causal(qk_norm=True, qk_norm_over="width")),
    "one_kv_head": decoder(n_kv_heads=1, tie_embeddings=False),
    "shared_kv_heads": decoder(
        n_heads=8, n_kv_heads=2, attention=Causal(bias=True, qk_norm=True), vocab_size=41, position=Learned()
    ),
    "window": decoder(attention=SlidingWindow(window=3, qk_norm=True), position=NoPosition(), dropout=0.1),
}  # fmt: skip


def loss_and_gradients(model: nn.Module, given: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean loss of two micro-batches and its gradients."""
    model.train()
    count = given.weights.sum()
    total = torch.zeros(())
    for part in given.split(2):
        loss, _ = model(part)
        (loss / count).backward()
        total += loss.detach() / count
    return total, {name: p.grad for name, p in model.named_parameters()}


def built(choice: Decoder, tp: TensorParallel) -> nn.Module:
    model = choice.build(n_valid=N_VALID, seq_len=SEQ_LEN, tp=tp, seed=11)
    initialise(model, seed=5)
    return model


def norm_of(model: nn.Module, axis: Axis | None = None) -> Tensor:
    pieces = [piece for p in model.parameters() for piece in counted_and_copies(shard_of(p), p.grad)[0]]
    return global_norm(squared_norm(pieces, [], torch.device("cpu")), [axis] if axis else [])


def cut_against_whole(n: int, names: list[str]) -> list[dict[str, tuple[Any, ...]]]:
    axis = Mesh.of(tp=n).at(dist.get_rank()).connect().axis("tp")
    held = []
    for name in names:
        for given in (PACKED, WHOLE):
            whole = built(CHOICES[name], TensorParallel())
            exact, full_grads = loss_and_gradients(whole, given)
            for sequence in (False, True):
                case = f"{name}, sequence parallel {sequence}, most documents {given.most_documents}"
                local = built(CHOICES[name], TensorParallel(axis, sequence))
                full = dict(whole.named_parameters())
                assert list(full) == [key for key, _ in local.named_parameters()], case
                for key, p in local.named_parameters():
                    assert torch.equal(p, shard_of(p).cut(full[key].detach())), f"{case}: {key} starts elsewhere"
                loss, grads = loss_and_gradients(local, given)
                assert math.isclose(loss, exact, rel_tol=1e-6), f"{case}: loss {loss} for {exact}"
                sum_partial(gradients_of(local.parameters()), axis)
                for key, p in local.named_parameters():
                    assert_copies_are_equal(key, p, axis)
                    off = error(grads[key], shard_of(p).cut(full_grads[key]), at_least=1e-4)
                    assert off < 1e-4, f"{case}: the gradient of {key} is off by {off:.1e}"
                norm, exact_norm = norm_of(local, axis), norm_of(whole)
                assert math.isclose(norm, exact_norm, rel_tol=1e-6), f"{case}: norm {norm} for {exact_norm}"
        held.append({key: (shard_of(p).dim, shard_of(p).parts, full[key].shape) for key, p in local.named_parameters()})
    return held


def assert_held_once(held: list[dict[str, tuple[Any, ...]]]) -> None:
    """Over the ranks, the counted parts of each parameter cover it without gap or overlap."""
    for key, (dim, _, shape) in held[0].items():
        parts = sorted((part.start, part.stop) for rank in held for part in rank[key][1] if part.counted)
        assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])], key
        assert parts[-1][1] == shape[dim], key


def assert_copies_are_equal(key: str, p: Tensor, axis: Axis) -> None:
    """Ranks that hold the same values have the same gradient for them, to the last bit."""
    assert p.grad is not None
    mine = []
    for part, grad in zip(shard_of(p).parts, p.grad.split(sizes_of(p), shard_of(p).dim), strict=True):
        mine.append(((part.start, part.stop), grad.sum().item()))
    everyone: list[Any] = [None] * axis.size
    dist.all_gather_object(everyone, mine, group=axis.group)
    found: dict[tuple[int, int], float] = {}
    for place, total in (piece for rank in everyone for piece in rank):
        assert found.setdefault(place, total) == total, f"copies of {key} {place} have different gradients"


def sizes_of(p: Tensor) -> list[int]:
    return [part.stop - part.start for part in shard_of(p).parts]


@pytest.mark.parametrize(
    ("n", "names"),
    [
        (2, [n for n in CHOICES if n != "shared_kv_heads"]),
        (3, ["padded", "gpt", "one_kv_head"]),
        (4, ["shared_kv_heads"]),
    ],
    ids=["tp2", "tp3", "tp4"],
)
def test_a_cut_decoder_gives_the_loss_gradients_and_norm_of_the_whole_one(n, names):
    for held in zip(*run(cut_against_whole, n, n, names), strict=True):
        assert_held_once(list(held))
