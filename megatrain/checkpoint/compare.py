"""What a checkpoint holds, and how two of them, or a checkpoint and a model, differ."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatrain.checkpoint.manifest import StoredTensor
from megatrain.checkpoint.read import Reader
from megatrain.checkpoint.tensorfile import DTYPE_NAMES
from megatrain.config.build import flat


@dataclass(frozen=True)
class Summary:
    """One tensor. The figures are None where values were not read."""

    state: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    slices: int
    norm: float | None = None
    """2-norm over the finite values."""
    largest: float | None = None
    not_finite: int | None = None


def summaries(reader: Reader, values: bool) -> Iterator[Summary]:
    """Every tensor, by state and name, one in memory at a time; `values` reads them for their norms."""
    for (state, name), stored in sorted(reader.manifest.tensors.items()):
        figures: dict[str, Any] = {}
        if values:
            x = reader.read_full(name, state).double()
            finite = x[x.isfinite()]
            figures = {
                "norm": float(finite.norm()),
                "largest": float(finite.abs().max()) if finite.numel() else 0.0,
                "not_finite": x.numel() - finite.numel(),
            }
        yield Summary(state, name, stored.shape, DTYPE_NAMES[stored.dtype], len(stored.slices), **figures)


@dataclass(frozen=True)
class Difference:
    """How one tensor, or one value beside the tensors, differs between checkpoints a and b."""

    what: str
    how: str


def diff(a: Reader, b: Reader) -> Iterator[Difference]:
    """What is not the same bits in two checkpoints: config, state, tensors. What has equal digests is not read."""
    for part in ("config", "tokenizer"):
        yield from _differing(part, a.facts.get(part), b.facts.get(part))
    yield from _differing("state", a.state, b.state)
    for key in sorted(a.manifest.tensors.keys() | b.manifest.tensors.keys()):
        label, mine, theirs = "/".join(key), a.manifest.tensors.get(key), b.manifest.tensors.get(key)
        if mine is None or theirs is None:
            yield Difference(label, f"only in {'b' if mine is None else 'a'}")
        elif mine.shape != theirs.shape:
            yield Difference(label, f"shape {list(mine.shape)} in a, {list(theirs.shape)} in b")
        elif not _same_slices(mine, theirs):
            x, y = a.read_full(key[1], key[0]), b.read_full(key[1], key[0])
            if mine.dtype != theirs.dtype or not _same_bits(x, y):
                yield Difference(label, _distance(x, y))


def _differing(part: str, a: Any, b: Any) -> Iterator[Difference]:
    before, now = (flat(v) if isinstance(v, dict | list) else {"": v} for v in (a, b))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            yield Difference(f"{part}.{key}".rstrip("."), f"{before.get(key)} in a, {now.get(key)} in b")


def _same_slices(a: StoredTensor, b: StoredTensor) -> bool:
    return (a.matrix, a.dtype) == (b.matrix, b.dtype) and {(s.box, s.digest) for s in a.slices} == {
        (s.box, s.digest) for s in b.slices
    }


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))


def _distance(a: Tensor, b: Tensor) -> str:
    kinds = "" if a.dtype == b.dtype else f"{DTYPE_NAMES[a.dtype]} in a, {DTYPE_NAMES[b.dtype]} in b; "
    x, y = a.double(), b.double()
    differ = (x != y) & ~(x.isnan() & y.isnan())
    n, finite = int(differ.sum()), x.isfinite() & y.isfinite()
    if n == 0:
        return f"{kinds}the values are equal"
    lost = int((differ & ~finite).sum())
    infinite = f"; {lost} of them are not finite in a or in b" if lost else ""
    if n == lost:
        return f"{kinds}{n} of {a.numel()} elements differ{infinite}"
    x, y = x[finite], y[finite]
    largest, relative = float((x - y).abs().max()), float((x - y).norm() / x.norm().clamp_min(1e-300))
    return (
        f"{kinds}{n} of {a.numel()} elements differ, by at most {largest:.3g}; relative norm {relative:.3g}{infinite}"
    )


def differences(saved: dict[str, tuple[int, ...]], model: dict[str, tuple[int, ...]]) -> list[str]:
    """How the names and shapes of a checkpoint's weights differ from a model's, a line for each kind."""
    missing, extra = sorted(set(model) - set(saved)), sorted(set(saved) - set(model))
    other = sorted(name for name in set(saved) & set(model) if tuple(saved[name]) != tuple(model[name]))
    found = []
    if missing:
        found.append(f"{len(missing)} weights of the model are not in it: {some(missing)}")
    if extra:
        found.append(f"{len(extra)} of its weights are not in the model: {some(extra)}")
    if other:
        shapes = [f"{name} {list(saved[name])} in it, {list(model[name])} in the model" for name in other]
        found.append(f"{len(other)} have another shape: {some(shapes)}")
    return found


def some(names: list[str], n: int = 8) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")
