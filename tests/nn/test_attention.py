"""Every registered attention kind: equal to its slow twin, blind to the future and to other documents."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatrain.nn.attention import ATTENTION, AttentionCase
from megatrain.nn.attention.kernel import dense, scaled_dot_product, takes_borders
from megatrain.nn.attention.layer import SelfAttention
from megatrain.nn.attention.sliding_window import SlidingWindow
from megatrain.nn.norm.rms_norm import RMSNorm
from megatrain.nn.position.rotary import Rotary
from megatrain.nn.where import Borders, Where
from megatrain.parallel.collectives import own_rows
from megatrain.parallel.mesh import Mesh
from megatrain.parallel.shard import shard_of
from megatrain.parallel.tensor import TensorParallel
from tests.contract import DTYPES, assert_near, assert_same_function, examples, leaf, randomise, where
from tests.ranks import run

T, HEAD_DIM, D_MODEL = 16, 8, 32
ROWS = {"whole": ((T,), (T,)), "packed": ((5, 11), (1, 6, 9))}
HEADS = {"equal": (4, 4), "grouped": (4, 2), "one": (4, 1)}

kinds = pytest.mark.parametrize("kind", examples(ATTENTION))
packings = pytest.mark.parametrize("documents", ROWS.values(), ids=ROWS)


def prepared(kind, documents) -> Where:
    here = where(*documents)
    here.mask = kind.prepare(here)
    here.tables = Rotary().prepare(here.positions, HEAD_DIM)
    return here


def layer_of(kind, tp: TensorParallel | None = None, n_kv_heads: int = 2) -> SelfAttention:
    return SelfAttention(
        d_model=D_MODEL,
        n_heads=4,
        n_kv_heads=n_kv_heads,
        head_dim=HEAD_DIM,
        kind=kind,
        position=Rotary(),
        norm=RMSNorm(),
        tp=tp or TensorParallel(),
        name="layers.0",
        init_std=0.2,
        out_std=0.2,
    )


@kinds
@packings
@pytest.mark.parametrize(("h", "g"), HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_fast_path_equals_the_slow_twin_with_gradients(kind, documents, h, g, dtype):
    assert kind.unsupported_reasons(AttentionCase(HEAD_DIM, h, g, packed=len(documents[0]) > 1)) == []
    here = prepared(kind, documents)
    q = leaf(2, h, T, HEAD_DIM, dtype=dtype, seed=1)
    k, v = (leaf(2, g, T, HEAD_DIM, dtype=dtype, seed=s) for s in (2, 3))
    assert_same_function(
        lambda q, k, v: kind.attend(q, k, v, here), lambda q, k, v: kind.reference(q, k, v, here), [q, k, v]
    )


@kinds
@packings
def test_a_query_reads_exactly_the_keys_that_its_kind_names(kind, documents):
    """With one-hot values the output is the row of attention weights itself."""
    here = prepared(kind, documents)
    q, k = leaf(2, 1, T, HEAD_DIM, seed=1).detach(), leaf(2, 1, T, HEAD_DIM, seed=2).detach()
    weights = kind.attend(q, k, torch.eye(T).expand(2, 1, T, T), here)
    same = here.documents[:, :, None] == here.documents[:, None, :]
    named = kind.visible(here.positions[:, :, None], here.positions[:, None, :]) & same
    assert torch.equal(weights[:, 0] > 0, named)
    assert_near(weights.sum(-1), torch.ones(2, 1, T))


@kinds
@packings
@pytest.mark.parametrize("changed", [0, 5, T - 1])
def test_the_future_never_leaks(kind, documents, changed):
    layer, here = layer_of(kind), prepared(kind, documents)
    randomise(layer)
    x = leaf(2, T, D_MODEL).detach()
    before = layer(x, here)
    x[:, changed] += 1
    after = layer(x, here)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed], after[:, changed])


@kinds
def test_documents_never_leak(kind):
    layer, here = layer_of(kind), prepared(kind, ROWS["packed"])
    randomise(layer)
    x = leaf(2, T, D_MODEL).detach()
    before = layer(x, here)
    second = here.documents == 1
    x[second] += 1
    after = layer(x, here)
    assert torch.equal(before[~second], after[~second])
    assert not torch.equal(before[second], after[second])


@kinds
def test_a_packed_document_is_what_it_would_be_alone(kind):
    layer, x = layer_of(kind), leaf(1, T, D_MODEL).detach()
    randomise(layer)
    packed = layer(x, prepared(kind, ((6, 10),)))
    alone = [layer(x[:, :6], prepared(kind, ((6,),))), layer(x[:, 6:], prepared(kind, ((10,),)))]
    assert_near(packed, torch.cat(alone, 1))


@kinds
def test_score_pairs_count_what_is_visible(kind):
    """To within the half of the diagonal that counting squares leaves out."""
    for n in (1, 3, 4, 5, 64):
        at = torch.arange(n)
        assert abs(kind.score_pairs(n) - int(kind.visible(at[:, None], at[None]).sum())) <= n / 2


@pytest.mark.parametrize(("window", "seen"), [(1, [7]), (2, [6, 7]), (8, list(range(8))), (100, list(range(8)))])
def test_a_window_counts_the_query_itself(window, seen):
    found = SlidingWindow(window=window).visible(torch.tensor(7), torch.arange(12))
    assert found.nonzero().flatten().tolist() == seen


def test_a_window_of_no_keys_is_refused():
    assert "1 or more" in SlidingWindow(window=0).problems()[0]
    assert SlidingWindow(window=1).problems() == []


@kinds
def test_what_looks_ahead_is_refused(kind):
    assert kind.unsupported_reasons(AttentionCase(HEAD_DIM, 4, 4, causal=False))


@kinds
@packings
def test_the_layer_is_the_same_when_compiled(kind, documents):
    torch._dynamo.reset()  # it compiles a function only so many times in a process
    layer, here = layer_of(kind), prepared(kind, documents)
    randomise(layer)
    fast = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
    x = leaf(2, T, D_MODEL)
    inputs = [x, *layer.parameters()]
    assert_same_function(lambda x, *_: fast(x, here), lambda x, *_: layer(x, here), inputs, 3e-6)


def cut_against_whole() -> None:
    axis = Mesh.of(tp=2).at(dist.get_rank()).connect().axis("tp")
    for kind in (param.values[0] for param in examples(ATTENTION)):
        for sequence in (False, True):
            tp, here = TensorParallel(axis, sequence), prepared(kind, ROWS["packed"])
            whole, local = layer_of(kind), layer_of(kind, tp)
            randomise(whole)
            with torch.no_grad():
                for p, full in zip(local.parameters(), whole.parameters(), strict=True):
                    p.copy_(shard_of(p).cut(full))
            own = own_rows if sequence else lambda t, _: t
            x, cotangent = leaf(2, T, D_MODEL), leaf(2, T, D_MODEL, seed=5).detach()
            exact = whole(x, here)
            grads = torch.autograd.grad(exact, [x, *whole.parameters()], cotangent)
            x_here = own(x, axis).detach().requires_grad_()
            y = local(x_here, here)
            assert_near(y, own(exact, axis))
            found = torch.autograd.grad(y, [x_here, *local.parameters()], own(cotangent, axis))
            assert_near(found[0], own(grads[0], axis), 1e-5)
            for p, grad, expected in zip(local.parameters(), found[1:], grads[1:], strict=True):
                if shard_of(p).summed_over_tp:
                    dist.all_reduce(grad, group=axis.group)
                assert_near(grad, shard_of(p).cut(expected), 1e-5)


def test_tp_2_gives_the_outputs_and_gradients_of_tp_1():
    run(cut_against_whole, 2)


# ------------------------------------------------------------------------------------------------ document by document


def flash_attention(q, k, v, starts, starts_k, longest, longest_k, dropout, causal, debug, **window):
    """What the documentation of FlashAttention says of its form for sequences laid end to end, one after the other."""
    assert (dropout, causal, debug) == (0.0, True, False)
    assert starts is starts_k
    left, right = window.get("window_size_left", -1), window.get("window_size_right", 0)
    assert right == 0
    y = torch.zeros_like(q)
    for begin, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        assert 0 <= end - begin <= longest == longest_k
        for h in range(q.shape[1]):
            g = h * k.shape[1] // q.shape[1]
            for i in range(begin, end):
                first = begin if left < 0 else max(begin, i - left)
                scores = (k[first : i + 1, g] @ q[i, h]) / q.shape[2] ** 0.5
                y[i, h] = scores.softmax(0) @ v[first : i + 1, g]
    return y, None, None, None, None


@kinds
@packings
def test_kernels_that_go_from_document_to_document_see_what_a_mask_shows(kind, documents, monkeypatch):
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_attention)
    masked, here = prepared(kind, documents), where(*documents)
    here.by_documents = True
    here.mask = kind.prepare(here)
    assert (here.mask is None) == (masked.mask is None)
    assert masked.mask is None or isinstance(here.mask, Borders)
    q = leaf(2, 4, T, HEAD_DIM, seed=1)
    k, v = (leaf(2, 2, T, HEAD_DIM, seed=s) for s in (2, 3))
    assert_same_function(
        lambda q, k, v: kind.attend(q, k, v, here), lambda q, k, v: kind.reference(q, k, v, masked), [q, k, v]
    )


def test_the_borders_of_documents_are_their_first_tokens_and_then_nothing():
    borders = where((5, 11), (1, 6, 9)).borders()
    assert borders.starts.tolist() == [0, 5, 16, 16, 17, 23, 32]  # three places a row
    assert borders.longest == T
    assert borders.starts.dtype == torch.int32
    assert where((T,), (T,)).borders().starts.tolist() == [0, T, 2 * T]


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "taken"),
    [
        ("cuda", torch.bfloat16, 64, True),
        ("cuda", torch.float16, 256, True),
        ("cuda", torch.float32, 64, False),
        ("cuda", torch.bfloat16, 60, False),
        ("cuda", torch.bfloat16, 264, False),
        ("cpu", torch.bfloat16, 64, False),
    ],
)
def test_borders_are_taken_by_cards_in_sixteen_bits_alone(device, dtype, head_dim, taken):
    activations = SimpleNamespace(device=torch.device(device), dtype=dtype)  # there is no card to hold any
    assert takes_borders(activations, head_dim) is taken


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("shown", ["all", "masked", "autocast"])
def test_short_rows_in_bf16_have_gradients_of_float32(shown, compiled, monkeypatch):
    """One rounding of what is kept and one of the result, where torch's bf16 kernel rounds in between too."""
    monkeypatch.setattr("megatrain.parallel.product.CPU_MULTIPLIES_BF16", True)
    dtype = torch.float32 if shown == "autocast" else torch.bfloat16
    q = leaf(2, 4, T, HEAD_DIM, seed=1, dtype=dtype)
    k, v = (leaf(2, 2, T, HEAD_DIM, seed=s, dtype=dtype) for s in (2, 3))
    lower = torch.ones(T, T, dtype=torch.bool).tril()[None, None].expand(2, -1, -1, -1)
    mask = lower.clone() if shown == "masked" else None
    if mask is not None:
        mask[1, :, 7:, :3] = False

    def fast(q, k, v):
        with torch.autocast("cpu", torch.bfloat16, enabled=shown == "autocast"):
            return scaled_dot_product(q, k, v, mask, causal=True)

    attend = torch.compile(fast, fullgraph=True, backend="aot_eager") if compiled else fast
    y, exact = attend(q, k, v), dense(q, k, v, lower if mask is None else mask)
    assert y.dtype == torch.bfloat16
    assert_near(y, exact, 2**-7)
    cotangent = leaf(*y.shape, seed=9).detach().bfloat16()
    found = torch.autograd.grad(y, [q, k, v], cotangent)
    expected = torch.autograd.grad(exact, [q, k, v], cotangent.double())
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        assert_near(a, b, 2**-7)
