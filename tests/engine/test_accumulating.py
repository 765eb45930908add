"""Weight gradients that are added up in their product are those that autograd adds up."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatrain.base.device import Device
from megatrain.engine.accumulating import AccumulatingPasses, PaidAtOnce, accumulating, plain_passes
from megatrain.engine.api import Parts, Precision
from megatrain.engine.passes import Passes
from megatrain.parallel.deferred import Owed
from megatrain.parallel.embedding import UsedRows, VocabParallelEmbedding, add_to_rows
from megatrain.parallel.mesh import ALONE, Mesh
from megatrain.parallel.shard import constant, initialise
from megatrain.parallel.tensor import TensorParallel
from tests.engine.toy import MODEL, OPTIMIZER, SEQ_LEN, VOCABULARY, floats, toy_batch, toy_engine

CPU = torch.device("cpu")


def gradients(kind: type[Passes], form: torch.dtype, **options: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss sum and gradients of three micro-batches of two rows, and of one row in the last."""
    model = MODEL.build(n_valid=VOCABULARY, seq_len=SEQ_LEN)
    initialise(model, seed=3)
    for p in model.parameters():
        p.data = p.data.to(form)
        p.grad_dtype = torch.float32
    passes = kind(model=model, data=ALONE, micro_batch=2, device=CPU, **options)
    batch = toy_batch(0, 7)
    passes.evaluate(batch)  # leaves no trace
    loss = passes.forward_backward(batch, passes.global_tokens(batch))
    return float(loss), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_float32_gradients_are_autograds_to_rounding() -> None:
    loss, mine = gradients(AccumulatingPasses, torch.float32, dtype=torch.float32)
    expected_loss, expected = gradients(Passes, torch.float32)
    assert loss == expected_loss
    assert mine.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-5, atol=1e-8)


def test_bf16_weights_have_float32_gradients_at_least_as_near_to_the_truth() -> None:
    _, mine = gradients(AccumulatingPasses, torch.bfloat16, dtype=torch.bfloat16)
    _, autograds = gradients(Passes, torch.bfloat16)
    _, truth = gradients(Passes, torch.float32)
    errors = {n: ((mine[n] - t).norm(), (autograds[n] - t).norm()) for n, t in truth.items()}
    assert {g.dtype for g in mine.values()} == {torch.float32}
    for name, (error, autograds_error) in errors.items():
        chance = 1.5 if truth[name].dim() == 1 else 1.0  # a vector's gradient is not theirs, and few numbers
        assert error < chance * autograds_error, name
    total, autograds_total = (sum(float(e) ** 2 for e in of_all) for of_all in zip(*errors.values(), strict=True))
    assert total < 0.9 * autograds_total


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_the_heads_gradient_is_added_to_one_sum_and_is_autograds(tied: bool, z_loss: float) -> None:
    choice = dataclasses.replace(MODEL, tie_embeddings=tied, z_loss=z_loss, vocab_size=VOCABULARY)
    found = []
    for kind, options in ((AccumulatingPasses, {"dtype": torch.float32}), (Passes, {})):
        model = choice.build(n_valid=VOCABULARY - 3, seq_len=SEQ_LEN)  # three rows of padding
        initialise(model, seed=3)
        passes = kind(model=model, data=ALONE, micro_batch=2, device=CPU, **options)
        batch = toy_batch(0, 7)
        batch.tokens.clamp_(max=VOCABULARY - 4), batch.targets.clamp_(max=VOCABULARY - 4)
        places = set()
        for _ in range(2):
            passes.forward_backward(batch, passes.global_tokens(batch))
            places.add(model.head.weight.grad.data_ptr())
        assert len(places) == 1
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-5, atol=1e-7)


def test_losses_outside_of_a_step_and_frozen_weights_are_autograds() -> None:
    model = MODEL.build(n_valid=VOCABULARY, seq_len=SEQ_LEN)
    initialise(model, seed=3)
    passes = AccumulatingPasses(model=model, data=ALONE, micro_batch=2, device=CPU, dtype=torch.float32)
    batch = toy_batch(0, 4)
    frozen = model.layers["0"].attention.to_qkv.weight.requires_grad_(False)
    passes.forward_backward(batch, passes.global_tokens(batch))
    assert frozen.grad is None
    model.zero_grad()
    model(batch)[0]  # of which nobody asks the gradient
    assert model.head.weight.grad is None
    (model(batch)[0] * 5).backward()
    once = model.head.weight.grad.clone()
    model.zero_grad()
    model(batch)[0].backward()
    torch.testing.assert_close(once, 5 * model.head.weight.grad)
    with pytest.raises(TypeError, match="no backward of one's own"):
        passes.forward_backward(batch, passes.global_tokens(batch), lambda loss, last: loss.backward())


@pytest.mark.parametrize("rows", [[5], [3, 3, 3], [0, 7, 0, 2, 7, 7, 1], list(range(8)) * 3], ids=str)
def test_rows_that_were_used_are_added_to_and_no_others(rows: list[int]) -> None:
    before, values = torch.randn(8, 4), torch.randn(len(rows), 4)
    total = before.clone()
    add_to_rows(total, torch.tensor(rows), values.bfloat16())
    expected = before.double().index_add(0, torch.tensor(rows), values.bfloat16().double())
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-6)
    unused = [row for row in range(8) if row not in rows]
    assert torch.equal(total[unused], before[unused])


def test_the_embeddings_gradient_is_never_as_large_as_the_vocabulary_but_once() -> None:
    layer = VocabParallelEmbedding(50, 8, TensorParallel(), init=constant(1.0))
    initialise(layer, seed=0)
    layer.weight.data, layer.look_up = layer.weight.data.bfloat16(), UsedRows(layer)
    tokens = torch.tensor([[4, 4, 9]])
    for _ in range(3):
        layer(tokens).sum().backward()
        place = layer.weight.grad.data_ptr()
    assert layer.weight.grad.data_ptr() == place
    assert layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad[[4, 9, 0], 0].tolist() == [6.0, 3.0, 0.0]
    layer.weight.requires_grad_(False)
    assert not layer(tokens).requires_grad


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
@pytest.mark.parametrize("compiled", [False, True])
def test_a_block_is_paid_before_the_backward_of_the_one_below_begins(compiled: bool, monkeypatch: Any) -> None:
    """Else the inputs and gradients of all products of all blocks would be kept until the end."""
    model: Any = dataclasses.replace(MODEL, n_layers=3).build(n_valid=VOCABULARY, seq_len=SEQ_LEN)
    initialise(model, seed=3)
    events: list[str] = []
    numbers = {id(layer): name for name, block in model.layers.items() for layer in block.modules()}
    pay = PaidAtOnce.add

    def paid(queue: PaidAtOnce, owed: Owed) -> None:
        events.append(f"paid {numbers[id(owed.layer)]}")
        pay(queue, owed)

    def watched(name: str) -> Callable[..., None]:
        def watch(block: Any, args: Any, y: torch.Tensor) -> None:
            y.register_hook(lambda grad: events.append(f"begins {name}"))

        return watch

    monkeypatch.setattr(PaidAtOnce, "add", paid)
    for name, block in model.layers.items():
        block.register_forward_hook(watched(name))
    if compiled:
        model.compile_blocks("aot_eager")
    passes = AccumulatingPasses(model=model, data=ALONE, micro_batch=2, device=CPU, dtype=torch.float32)
    batch = toy_batch(0, 2)
    passes.forward_backward(batch, passes.global_tokens(batch))
    assert events == [event for i in "210" for event in (f"begins {i}", *[f"paid {i}"] * 4)]


@pytest.mark.parametrize("adds_at_once", [False, True])
def test_a_step_that_broke_leaves_nothing_to_the_one_after(adds_at_once: bool, monkeypatch: Any) -> None:
    """The head's gradient is there before backward; another micro-batch's would be in any case."""
    monkeypatch.setattr("megatrain.engine.accumulating.accumulating", lambda parts: adds_at_once)
    engines = [toy_engine("plain", 0, Mesh(), micro_batch=2) for _ in range(2)]
    backward, calls = torch.Tensor.backward, []

    def breaks(loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        calls.append(loss)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        backward(loss, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", breaks)
        with pytest.raises(RuntimeError, match="out of memory"):
            engines[0].step(toy_batch(0, 4), 1e-2)
    found, expected = (floats(engine.step(toy_batch(1, 4), 1e-2)) for engine in engines)
    assert found == expected


def parts(kind: str, **precision: str) -> Parts:
    model = MODEL.build(n_valid=VOCABULARY, seq_len=SEQ_LEN)
    return Parts(model, OPTIMIZER, Mesh(), Device(kind), Precision(**precision), 1, 0)


def test_products_accumulate_on_a_gpu_in_bf16_only() -> None:
    bf16 = parts("cuda", compute="bf16", parameters="bf16")
    assert accumulating(bf16)
    assert isinstance(plain_passes(bf16), AccumulatingPasses)
    assert not accumulating(parts("cuda"))
    assert not accumulating(parts("cpu", compute="bf16", parameters="bf16"))


@pytest.mark.gpu
def test_a_product_on_a_gpu_adds_to_its_result_in_place() -> None:
    from megatrain.parallel.product import add_product

    total = torch.ones(32, 16, device="cuda")
    place = total.data_ptr()
    grad, x = (torch.randn(64, n, device="cuda", dtype=torch.bfloat16) for n in (32, 16))
    add_product(total, grad, x)
    assert total.data_ptr() == place
    torch.testing.assert_close(total, 1 + grad.float().T @ x.float(), rtol=1e-4, atol=1e-3)
