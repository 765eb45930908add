"""Kinds of context parallelism: each gives every rank its tokens of what one process computes over whole rows."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatrain.nn.attention import ATTENTION
from megatrain.nn.attention.causal import Causal
from megatrain.nn.attention.kernel import attend_part, attend_part_backward
from megatrain.nn.attention.sliding_window import SlidingWindow
from megatrain.nn.context import CONTEXT
from megatrain.nn.context.ring import Ring, _merge, columns_of, steps_of
from megatrain.nn.where import Where
from megatrain.parallel.mesh import Axis, Mesh
from tests.contract import assert_near, batch, leaf, where
from tests.ranks import run

HEAD_DIM = 8
ROWS = {
    "whole": lambda t: ((t,), (t,)),
    "packed": lambda t: ((5, t - 5), (1, 2, t - 3)),  # borders inside of chunks and at none of their edges
}
HEADS = {"grouped": (4, 2), "equal": (2, 2)}


def blockwise() -> list[Any]:
    return [kind for _, cls in ATTENTION.items() if getattr(cls, "blockwise", False) for kind in cls.examples()]


def own(x: torch.Tensor, columns: tuple[tuple[int, int], ...], dim: int = 2) -> torch.Tensor:
    return torch.cat([x.narrow(dim, start, stop - start) for start, stop in columns], dim)


def against_whole_rows(n: int, compiled: bool) -> int:
    """Outputs and gradients of every kind on `n` ranks; how many cases were compared."""
    axis = Mesh.of(cp=n).at(dist.get_rank()).connect().axis("cp")
    t, cases = 4 * n * 2, 0
    for name, cls in CONTEXT.items():
        context = cls(axis)
        mine = context.columns(t)
        for kind in blockwise() if not compiled else [Causal(), SlidingWindow(window=3)]:
            for documents in ROWS.values():
                for h, g in HEADS.values():
                    if cls.head_problems(kind, h, g, 1, n):
                        continue
                    here: Where = where(*documents(t))
                    q = leaf(2, h, t, HEAD_DIM, seed=1)
                    k, v = (leaf(2, g, t, HEAD_DIM, seed=s) for s in (2, 3))
                    cotangent = leaf(2, h, t, HEAD_DIM, seed=4).detach()
                    exact = kind.reference(q, k, v, here)
                    expected = torch.autograd.grad(exact, (q, k, v), cotangent.double())
                    here.mask = context.prepare(kind, here)
                    local = [own(x, mine).detach().requires_grad_() for x in (q, k, v)]
                    attend = (
                        torch.compile(context.attend, fullgraph=True, backend="aot_eager")
                        if compiled
                        else context.attend
                    )
                    y = attend(kind, *local, here)
                    what = f"{name} {kind} {h}/{g}"
                    assert_near(y, own(exact, mine), what=what)
                    found = torch.autograd.grad(y, local, own(cotangent, mine))
                    for a, b in zip(found, expected, strict=True):
                        assert_near(a, own(b, mine), what=f"gradient of {what}", at_least=1.0)
                    cases += 1
    return cases


@pytest.mark.parametrize(("n", "compiled"), [(2, False), (3, False), (2, True)])
def test_every_kind_gives_the_attention_of_whole_rows_with_gradients(n, compiled):
    assert run(against_whole_rows, n, n, compiled)[0] >= 8


@given(st.integers(1, 9), st.integers(1, 5))
def test_ring_ranks_cover_a_row_once_and_their_steps_every_visible_pair_once(size, each):
    t = 2 * size * each
    owner = torch.full((t,), -1)
    for rank in range(size):
        for start, stop in columns_of(rank, size, t):
            assert (owner[start:stop] == -1).all()
            owner[start:stop] = rank
    seen = torch.zeros(t, t, dtype=torch.int64)
    work = set()
    for rank in range(size):
        pairs = 0
        for step in steps_of(rank, size):
            for q in (columns_of(rank, size, t)[i] for i in step.queries):
                for k in (columns_of(step.source, size, t)[i] for i in step.keys):
                    seen[slice(*q), slice(*k)] += 1
                    pairs += (q[1] - q[0]) * (k[1] - k[0])
        work.add(pairs)
    assert (seen[torch.ones(t, t).tril().bool()] == 1).all()
    assert seen.max() == 1
    assert len(work) == 1, "ranks have unequal work"


@pytest.mark.parametrize("causal", [True, False])
def test_parts_of_a_softmax_merge_to_the_whole(causal):
    """Also where a query sees nothing of one part."""
    t = 6
    q, k, v = (leaf(2, 2, t, HEAD_DIM, seed=s) for s in (1, 2, 3))
    mask = torch.rand(2, 1, t, t, generator=torch.Generator().manual_seed(0)) < 0.5
    mask |= torch.eye(t).bool()
    mask[:, :, 0, 3:] = False
    if causal:
        mask = torch.ones(1, 1, t, t).tril().bool()
    scores = (q @ k.transpose(-1, -2) / HEAD_DIM**0.5).masked_fill(~mask, -torch.inf)
    exact = scores.softmax(-1) @ v
    total, lse = attend_part(q, k[:, :, :3], v[:, :, :3], mask[..., :3], causal=False)
    later, later_lse = attend_part(q, k[:, :, 3:], v[:, :, 3:], mask[..., 3:], causal=False)
    assert (later_lse[:, :, 0] == -torch.inf).all()
    total, lse = total.clone(), lse.clone()
    _merge(total, lse, later, later_lse)
    assert_near(total, exact)
    assert_near(lse, scores.logsumexp(-1))
    cotangent = leaf(*exact.shape, seed=5).detach()
    expected = torch.autograd.grad(exact, (q, k, v), cotangent)
    parts = [
        attend_part_backward(cotangent, q, total, lse, k[:, :, s], v[:, :, s], mask[..., s], causal=False)
        for s in (slice(0, 3), slice(3, t))
    ]
    assert_near(parts[0][0] + parts[1][0], expected[0])
    for i in (1, 2):
        assert_near(torch.cat([part[i] for part in parts], 2), expected[i])


@pytest.mark.parametrize(("kind", "size", "seq_len", "words"), [
    ("ring", 3, 16, "cannot be cut into 2 x cp = 6 equal chunks, two a rank: pick cp from [1, 2, 4, 8]"),
    ("ring", 2, 7, "pick cp from [1], make data.seq_len a multiple of 4, or set layout.cp_kind=ulysses"),
    ("ulysses", 3, 16, "cannot be cut over cp=3: pick cp from [1, 2, 4, 8, 16]"),
])  # fmt: skip
def test_rows_that_do_not_divide_are_refused_with_what_would(kind, size, seq_len, words):
    [sentence] = CONTEXT[kind].length_problems(seq_len, size)
    assert words in sentence
    assert CONTEXT[kind].length_problems(seq_len, 2 if seq_len == 16 else 1) == []


def test_what_cannot_be_put_together_from_parts_is_refused_in_a_ring():
    class Capped:
        kind = "capped"

    assert "set layout.cp_kind=ulysses" in Ring.head_problems(Capped(), 4, 4, 1, 2)[0]


def test_a_rank_of_ulysses_needs_a_head():
    [sentence] = CONTEXT["ulysses"].head_problems(Causal(), 8, 2, 2, 2)
    assert "model.n_kv_heads=2 leaves 1 heads on a tensor-parallel rank" in sentence
    assert "set layout.cp_kind=ring" in sentence


def test_columns_of_a_batch_keep_their_numbers():
    whole = batch((12,), (12,), vocab_size=9)
    part = whole.context_part(columns_of(1, 3, 12))
    assert part.own(part.positions)[0].tolist() == [2, 3, 8, 9]
    assert part.token_numbers().tolist() == [2, 3, 8, 9]
    assert [p.token_numbers().tolist() for p in part.split(1)][1] == [14, 15, 20, 21]
    parts = [whole.context_part(columns_of(r, 3, 12)).weights for r in range(3)]
    assert torch.equal(sum(parts), whole.weights)
    assert whole.context_part(((0, 12),)) is whole


def test_alone_every_kind_is_the_attention_kind_itself():
    for cls in (c for _, c in CONTEXT.items()):
        here, kind = where((3, 5)), Causal()
        q, k, v = (leaf(1, 2, 8, HEAD_DIM, seed=s) for s in (1, 2, 3))
        here.mask = cls(Axis("cp")).prepare(kind, here)
        assert torch.equal(here.mask, kind.prepare(here))
        assert torch.equal(cls(Axis("cp")).attend(kind, q, k, v, here), kind.attend(q, k, v, here))
        assert cls(Axis("cp")).columns(8) == ((0, 8),)
