"""A small decoder on small batches, driven by any engine: what the tests of this folder share."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.base.device import Device
from megatrain.engine.api import ENGINE, Engine, Parts, Precision
from megatrain.models.decoder import Decoder
from megatrain.nn.batch import Batch
from megatrain.optim.kinds.adamw import AdamW
from megatrain.parallel.mesh import Mesh
from megatrain.parallel.shard import Slice, initialise
from megatrain.parallel.tensor import TensorParallel

VOCABULARY, SEQ_LEN = 31, 8
MODEL = Decoder(d_model=20, n_layers=1, n_heads=2, d_ff=24)  # 20: partitions do not end where parameters do
OPTIMIZER = AdamW(lr=1e-2, eps=1e-4, clip=0.5)
"""A large eps keeps rounding from being amplified where gradients are almost zero; the clip is active throughout."""


def toy_batch(step: int, rows: int) -> Batch:
    """Rows of step `step`, with target weights of 0 and 1 that are unequally dense from row to row."""
    g = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, VOCABULARY, (rows, SEQ_LEN + 1), generator=g)
    tokens[:, 1::2] = tokens[:, 0:-1:2]  # something to learn
    density = torch.rand(rows, 1, generator=g)
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=(torch.rand(rows, SEQ_LEN, generator=g) < density).float(),
        positions=torch.arange(SEQ_LEN).expand(rows, -1),
        documents=torch.zeros(rows, SEQ_LEN, dtype=torch.int32),
        most_documents=1,
        step=step,
    )


def rows_of(batch: Batch, mesh: Mesh) -> Batch:
    """This rank's rows."""
    data = mesh.axis("data")
    return list(batch.split(batch.rows // data.size))[data.rank]


def connected(tp: int = 1) -> Mesh:
    """The mesh of this test's ranks, or of this process alone."""
    if not dist.is_initialized():
        return Mesh()
    return Mesh.of(dp=dist.get_world_size() // tp, tp=tp).at(dist.get_rank()).connect()


def toy_engine(kind: str, zero: int, mesh: Mesh, *, model: Any = None, micro_batch: int = 1, sequence: bool = False,
               optimizer: Any = OPTIMIZER, choice: Any = None, **precision: str) -> Engine:  # fmt: skip
    if model is None:
        tp = TensorParallel(mesh.axis("tp"), sequence)
        model = MODEL.build(n_valid=VOCABULARY, seq_len=SEQ_LEN, tp=tp)
        initialise(model, seed=3)
    parts = Parts(model, optimizer, mesh, Device("cpu"), Precision(**precision), micro_batch, zero)
    return (choice or ENGINE[kind]()).build(parts)


def floats(report: Any) -> tuple[float, float, float, float]:
    return float(report.loss), float(report.tokens), float(report.grad_norm), float(report.skipped)


# ------------------------------------------------------------------------------------------------ whole tensors

Pieces = list[tuple[Slice, Tensor]]


def pieces_of(engine: Engine) -> Pieces:
    """Counted slices and copies of their values, which can be sent to the test."""
    return [(piece, piece.values.clone()) for piece in engine.slices() if piece.counted]


def assembled(ranks: list[Pieces]) -> dict[tuple[str, str], Tensor]:
    """Full tensors by (state, name); every element must be there exactly once."""
    whole, seen = {}, {}
    for piece, values in (p for pieces in ranks for p in pieces):
        key, box = (piece.state, piece.name), piece.box
        into = whole.setdefault(key, torch.zeros(piece.matrix))
        count = seen.setdefault(key, torch.zeros(piece.matrix))
        at = (slice(box.row, box.row + box.n_rows), slice(box.column, box.column + box.n_columns))
        into[at] = values
        count[at] += 1
    for key, count in seen.items():
        assert (count == 1).all(), f"{key}: elements were counted {count.unique().tolist()} times"
    return whole


def filler(whole: dict[tuple[str, str], Tensor]) -> Any:
    """`fill` of `Engine.load` from full tensors."""

    def fill(piece: Slice) -> None:
        box = piece.box
        rows = whole[piece.state, piece.name][box.row : box.row + box.n_rows]
        piece.values.copy_(rows[:, box.column : box.column + box.n_columns])

    return fill
