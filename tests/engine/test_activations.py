"""What a rank keeps for backward: sequence parallelism divides it, and no rank ever holds a whole row of logits."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from megatrain.models.decoder import Decoder
from megatrain.parallel.mesh import Mesh
from megatrain.parallel.shard import initialise
from megatrain.parallel.tensor import TensorParallel
from tests.contract import batch
from tests.ranks import run

N_VALID, SEQ_LEN = 1021, 64  # a prime: no other width is the vocabulary's
MODEL = Decoder(d_model=48, n_layers=3, n_heads=4, d_ff=128)
BAR = 0.35
"""Largest share of the activations of one process that a rank of tp=4 may keep."""


class Widths(TorchDispatchMode):
    """Last dimensions of everything that operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = op(*args, **(kwargs or {}))
        self.seen |= {x.shape[-1] for x in tree_flatten(made)[0] if isinstance(x, Tensor) and x.ndim > 1}
        return made


def kept_and_widths(tp_size: int) -> tuple[int, list[int]]:
    """Bytes that a forward keeps for backward besides the parameters, each memory once; and widths of all tensors."""
    mesh = Mesh.of(tp=tp_size)
    mesh = mesh.at(dist.get_rank()).connect() if tp_size > 1 else mesh
    model = MODEL.build(n_valid=N_VALID, seq_len=SEQ_LEN, tp=TensorParallel(mesh.axis("tp"), sequence=True))
    initialise(model, seed=0)
    given = batch((20, SEQ_LEN - 20), (SEQ_LEN,), vocab_size=N_VALID)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    of_batch = {x.untyped_storage().data_ptr() for x in vars(given).values() if isinstance(x, Tensor)}
    gradients = {p.shape for p in model.parameters()}  # the head's gradient is made on the way forward: no activation
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with Widths() as widths, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss, _ = model(given)
        loss.backward()
    counted = [x for address, x in kept.items() if address not in own | of_batch and x.shape not in gradients]
    return sum(x.untyped_storage().nbytes() for x in counted), sorted(widths.seen)


@pytest.fixture(scope="module")
def ranks() -> list[tuple[int, list[int]]]:
    return run(kept_and_widths, 4, 4)


def test_sequence_parallelism_divides_what_is_kept_for_backward(ranks):
    whole, _ = kept_and_widths(1)
    shares = [kept / whole for kept, _ in ranks]
    assert max(shares) <= BAR, f"ranks of tp=4 keep {shares} of what one process keeps"
    assert min(shares) >= 1 / 4


def test_no_tensor_of_a_rank_is_as_wide_as_the_vocabulary(ranks):
    assert N_VALID in kept_and_widths(1)[1]
    assert all(N_VALID not in widths for _, widths in ranks)
