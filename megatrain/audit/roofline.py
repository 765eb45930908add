"""What a launch moves and computes, and the least time a card needs for it: a roofline (Williams et al. 2009).

A model of exact counts, not a measurement: each operand crosses the memory once, no launch waits for the host.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from megatrain.audit.compiled import kernel

aten = torch.ops.aten

ADDING = {aten.addmm, aten.addmm_, aten.baddbmm, aten.addmv}
"""Products whose first operand is what they are added to."""

PRODUCTS = ADDING | {aten.mm, aten.bmm, aten.mv, aten._scaled_mm, aten._grouped_mm}

OVERWRITING = {aten.copy_, aten.zero_, aten.fill_, aten._foreach_copy_, aten._foreach_zero_}
"""Operators that do not read their first operand."""

TAKING_ROWS = {aten.embedding, aten.index_select, aten.index, aten.gather}
"""Operators that read as much of their first operand as they give."""

TENSORS_A_LAUNCH = (110, 64, 48, 36, 30)
"""Tensors that one launch of a multi-tensor kernel takes, by the number of its lists."""

ELEMENTS_A_CHUNK, CHUNKS_A_LAUNCH = 65536, 320


@dataclass(frozen=True)
class Launch:
    """Of one operator; a multi-tensor operator may be several."""

    name: str
    count: int
    moved: int
    """Bytes read and written."""
    flops: int = 0
    """Of matrix products and of the part of attention that is not masked; 0 for all else."""
    head_dim: int = 0
    """Of attention."""
    format: torch.dtype | None = None
    """Of the operands of a product."""

    @classmethod
    def of(cls, func: Any, args: Any, kwargs: Any, out: Any) -> "Launch | None":
        """What the operator `func` does on a card; None where it touches nothing there."""
        packet = func._overloadpacket
        named = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        reads, writes = _traffic(func, packet, named, out)
        if not any(t.is_cuda for t in (*reads, *writes)):
            return None
        name = named["name"] if packet is kernel else str(packet).removeprefix("aten.")
        count, moved = 1 if packet is kernel else _launches(name, args), _size(reads) + _size(writes)
        if packet in PRODUCTS:
            a, b = args[1:3] if packet in ADDING else args[:2]
            return cls(name, count, moved, flops=2 * a.numel() * (b.shape[-1] if b.dim() > 1 else 1), format=a.dtype)
        if "attention" in name and "query" in named:
            return cls(name, count, moved, _attention_flops(name, named), named["query"].shape[-1])
        return cls(name, count, moved)


def _traffic(func: Any, packet: Any, named: Mapping[str, Any], out: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that are read and those that are written."""
    if packet is kernel:
        return list(named["reads"]), list(named["writes"])
    changed = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    if "grads" in changed and named.get("grad_scale") is None:
        changed -= {"grads"}  # a fused optimiser writes those only where it divides them
    writes = {id(t): t for t in _tensors([named.get(name) for name in changed]) + _tensors(out)}
    # no argument of an operator of one's own can be declared as `is_out`; its name says so
    unread = {a.name for a in func._schema.arguments if a.is_out or a.name.startswith("out_")}
    first = func._schema.arguments[0].name if func._schema.arguments else ""
    if packet in OVERWRITING:
        unread.add(first)
    reads = [t for name, value in named.items() if name not in unread for t in _tensors(value)]
    if packet is aten.index_add_:  # some rows: those of the source, read and written
        return [named["source"], named["source"]], [named["source"]]
    if packet in TAKING_ROWS:
        return [*_tensors(out), *reads[1:]], list(writes.values())
    return reads, list(writes.values())


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _size(tensors: Iterable[Tensor]) -> int:
    """Bytes of those on the card; of a tensor that repeats itself, what is stored."""
    on_card = (t for t in tensors if t.is_cuda)
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in on_card)


def _launches(name: str, args: Any) -> int:
    """Kernels that an operator starts: one, or as many as the tensors of a multi-tensor operator take."""
    lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
    if not lists or not ("_foreach_" in name or "_fused_" in name):
        return 1
    chunks = sum(-(-t.numel() // ELEMENTS_A_CHUNK) for t in lists[0])
    return max(-(-len(lists[0]) // TENSORS_A_LAUNCH[len(lists) - 1]), -(-chunks // CHUNKS_A_LAUNCH))


def _attention_flops(name: str, named: Mapping[str, Any]) -> int:
    """Two products forward; five backward, since the scores are made again. Causal: half of the square."""
    q, k = named["query"], named["key"]
    keys = k.shape[2] if q.dim() == 4 else named.get("max_k", k.shape[0])
    products = 5 if "backward" in name else 2
    return products * 2 * q.numel() * keys // (2 if named.get("is_causal") else 1)


@dataclass(frozen=True)
class Roofline:
    """Rates of a card, per second: what kernels reach, not what is on the label."""

    products: float
    """FLOPs of bf16 matrix products."""
    attention: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    """Size of a head -> FLOPs of attention forward and backward."""
    bytes: float = 0.0
    shortest: float = 2e-6
    """Seconds that a launch takes at least."""

    def seconds(self, launch: Launch) -> float:
        rate = self.products
        if launch.head_dim:
            size = min(self.attention, key=lambda size: abs(size - launch.head_dim))
            rate = self.attention[size]["backward" in launch.name]
        elif launch.format is torch.float32:
            rate /= 2  # tf32
        return max(launch.flops / rate, launch.moved / self.bytes, launch.count * self.shortest)


H100 = Roofline(
    products=0.87 * 790e12,  # 790 TFLOP/s at 8,192^3, less for the shapes of training
    attention={64: (420e12, 330e12), 128: (580e12, 450e12)},  # FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608)
    bytes=0.9 * 3.0e12,
)
"""An H100 SXM."""
