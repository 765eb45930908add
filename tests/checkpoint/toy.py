"""A holder of state in any layout: tensor parallelism cuts each tensor, ZeRO cuts what is left as one flat range."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatrain.checkpoint.manifest import COMMIT, MANIFEST, digest_of, encode
from megatrain.checkpoint.read import Commit
from megatrain.checkpoint.storage import LocalStorage
from megatrain.checkpoint.write import HostCopy, assemble, write_files
from megatrain.parallel.shard import Part, Shard, Slice, slices_of

STATES = ("weights", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Spec:
    """A parameter: its full shape, the dimension that tp cuts (None: tp copies it), fused blocks along it."""

    name: str
    shape: tuple[int, ...]
    dim: int | None = None
    blocks: int = 1


SPECS = (
    Spec("embedding.weight", (12, 4), 0),
    Spec("layers.0.norm.weight", (4,)),
    Spec("layers.0.attention.qkv.weight", (24, 4), 0, blocks=3),
    Spec("layers.0.attention.out.weight", (4, 8), 1),
    Spec("layers.0.experts.weight", (2, 8, 3), 1, blocks=2),
    Spec("scale", ()),
)


def full_tensors(specs=SPECS, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[tuple[str, str], Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {(state, s.name): torch.randn(s.shape, generator=g).to(dtype) for state in STATES for s in specs}


def shard_of(spec: Spec, rank: int, size: int) -> Shard:
    if spec.dim is None:
        n = spec.shape[0] if spec.shape else 1
        return Shard(spec.shape, None, 0, (Part(0, n, counted=rank == 0),))
    block = spec.shape[spec.dim] // spec.blocks
    each = block // size
    parts = tuple(Part(b * block + rank * each, b * block + (rank + 1) * each) for b in range(spec.blocks))
    return Shard(spec.shape, None, spec.dim, parts)


class Toy:
    """One rank's state. `tp` and `dp` are (rank, size); `zero` cuts over dp, else dp ranks hold copies."""

    def __init__(
        self,
        full: dict[tuple[str, str], Tensor] | None = None,
        tp: tuple[int, int] = (0, 1),
        dp: tuple[int, int] = (0, 1),
        zero: bool = False,
        specs=SPECS,
        dtype: torch.dtype = torch.float32,
    ):
        self.specs, self.dp, self.zero = specs, dp, zero
        self.shards = {s.name: shard_of(s, *tp) for s in specs}
        self.tensors = {
            (state, s.name): (
                torch.full(self.shards[s.name].local_shape if s.shape else (), float("nan"), dtype=dtype)
                if full is None
                else self.shards[s.name].cut(full[state, s.name]) if s.shape else full[state, s.name].clone()
            )
            for state in STATES
            for s in specs
        }  # fmt: skip
        self.scalars: dict[str, int] = {}

    def slices(self) -> Iterator[Slice]:
        total = sum(self.tensors["weights", s.name].numel() for s in self.specs)
        each = math.ceil(total / self.dp[1]) if self.zero else total
        first = self.dp[0] * each if self.zero else 0
        for state in STATES:
            at = 0
            for s in self.specs:
                flat = self.tensors[state, s.name].view(-1)
                begin, end = max(first, at), min(first + each, at + flat.numel())
                if begin < end:
                    for piece in slices_of(state, s.name, self.shards[s.name], flat[begin - at : end - at], begin - at):
                        copy = not self.zero and self.dp[0] > 0
                        yield Slice(**(vars(piece) | {"counted": piece.counted and not copy}))
                at += flat.numel()

    def load(self, fill: Callable[[Slice], None], states: Callable[[str], bool] = lambda state: True) -> None:
        for s in self.slices():
            if states(s.state):
                fill(s)


def ranks_of(full, tp: int, dp: int, zero: bool, specs=SPECS) -> list[Toy]:
    return [Toy(full, (t, tp), (d, dp), zero, specs) for d in range(dp) for t in range(tp)]


def commit_of(
    folder: Path, toys: list[Toy], step: int = 1, file_bytes: int = 2**30, state=None, facts: dict | None = None
) -> Commit:
    """What the ranks of `toys` together commit, made without processes."""
    storage, name = LocalStorage(folder), f"step-{step:08d}"
    storage.prepare(name)
    reports = []
    for rank, toy in enumerate(toys):
        copy = HostCopy()
        copy.take(toy.slices())
        reports.append(write_files(copy, storage, name, rank, file_bytes, lambda point: None).plain())
    text = encode(step, state, facts or {}, *assemble(reports))
    storage.write(f"{name}/{MANIFEST}", [text])
    storage.write(f"{name}/{COMMIT}", [digest_of(text).encode() + b"\n"])
    return Commit.open(storage, name)
