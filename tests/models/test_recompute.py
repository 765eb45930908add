"""Recomputation changes what is kept between forward and backward, and nothing else."""

import pytest
import torch

from megatrain.models.decoder import Decoder, DecoderModel
from megatrain.models.recompute import INSIDE, numbers, recompute, unmatched
from megatrain.nn.batch import Batch
from megatrain.parallel.shard import initialise


def model(what: str, compiled: bool = False) -> DecoderModel:
    choice = Decoder(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, dropout=0.2)
    found = choice.build(n_valid=50, seq_len=64, seed=3)
    initialise(found, 0)
    if what in INSIDE:
        recompute(found.layers, what)
    if compiled:
        found.compile_blocks("aot_eager")
    if what not in INSIDE:
        recompute(found.layers, what)
    return found


def batch() -> Batch:
    tokens = torch.randint(0, 50, (2, 65), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(64).expand(2, -1)
    documents = torch.zeros(2, 64, dtype=torch.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(2, 64), positions, documents, most_documents=1, step=5)


def backward(found: DecoderModel) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients, and bytes kept for backward."""
    kept = 0

    def keep(x: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss, _ = found(batch())
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in found.named_parameters() if p.grad is not None}, kept


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks at it itself
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("what", ["norms", "elementwise", "selective", "full", "0"])
def test_losses_and_gradients_are_those_of_keeping_everything(what: str, compiled: bool) -> None:
    loss, gradients, _ = backward(model("none", compiled))
    again, same, _ = backward(model(what, compiled))
    assert torch.equal(again, loss)
    assert same.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, rtol=1e-6, atol=1e-7, msg=name)


def test_more_recomputation_keeps_less() -> None:
    kept = {what: backward(model(what))[2] for what in ("none", "elementwise", "selective", "0", "full")}
    assert kept["full"] < kept["0"] < kept["none"]
    assert kept["full"] < kept["selective"] < kept["none"]
    assert kept["full"] < kept["elementwise"] < kept["none"]


def test_numbers_are_read_as_they_are_meant() -> None:
    assert numbers("3") == {3}
    assert numbers("0-3, 8") == {0, 1, 2, 3, 8}
    assert numbers("10-20:4,31") == {10, 14, 18, 31}
    for wrong in ("", "x", "1-", "-1", "1,,2", "0-4:0", "[0-3]", "*"):
        assert numbers(wrong) == set()


def test_what_names_no_block_is_refused() -> None:
    assert unmatched(3, "full") == unmatched(3, "0-1") == unmatched(3, "[12]") == []
    for wrong in ("5-9", "first", "3-1"):
        assert "names no block from 0 to 2" in unmatched(3, wrong)[0]
