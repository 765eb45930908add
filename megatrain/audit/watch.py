"""Every operator of a step, as a GPU would be given it: what it costs, and where the host would have to wait.

Placed inside FakeTensorMode on a fake card (see `fake_cuda`). FakeTensorMode alone lets the commonest faults pass: a
mask that is assigned through, an index from the CPU, a copy that blocks.
"""

import functools
import traceback
import weakref
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatrain.audit.allocator import CachingAllocator
from megatrain.audit.fake_cuda import host_waits
from megatrain.audit.roofline import H100, Launch, Roofline

aten = torch.ops.aten

NO_KERNEL = {
    aten._unsafe_view, aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided,
    aten.lift_fresh, aten.detach_, aten.set_, aten.resize_, aten.is_pinned, torch.ops.prim.device,
}  # fmt: skip
"""Operators that start nothing on the device."""

COPIES = {aten._to_copy, aten.copy_}
INDEXING = {aten.index, aten.index_put, aten.index_put_}


@dataclass(frozen=True)
class Finding:
    """Something that would stop or break a step on a GPU, and the line that asks for it."""

    what: str
    where: str

    def __str__(self) -> str:
        return f"{self.what} at {self.where}"


@dataclass
class Costs:
    """Counts of one watched step: one kernel an operator, each operand read or written once."""

    launches: int = 0
    bytes_moved: int = 0
    products: Counter[str] = field(default_factory=Counter)
    """Matrix products by the format of their operands."""
    operators: Counter[str] = field(default_factory=Counter)
    """Launches by operator, and by kernel where code is compiled."""
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """What the launches would take on a card at least, in the same way."""


class Watch(TorchDispatchMode):
    """`syncs`: where the host waits for the device; `mixes`: CPU tensors in a GPU operator; `costs`; `memory`.

    Args:
        late_reads: waits that are no fault, since what they wait for was queued a step ago.
        roofline: the card that seconds are modelled for.
    """

    def __init__(self, late_reads: int = 0, roofline: Roofline = H100) -> None:
        super().__init__()
        self.late_reads, self.roofline = late_reads, roofline
        self.costs = Costs()
        self.memory = CachingAllocator()
        self.syncs: list[Finding] = []
        self.mixes: list[Finding] = []
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._pinned: set[int] = set()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # torch.compile would skip every frame while this mode is on

    def __enter__(self) -> Self:
        self._waits_before = host_waits()
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        waits = host_waits() - self._waits_before - self.late_reads
        if waits > 0:
            self.syncs.append(Finding(f"{waits} x synchronize() of a stream or an event", "a line that is not known"))
        super().__exit__(*exc)

    def hold(self, *tensors: Tensor) -> None:
        """Count the memory of tensors: those that were there before, and each that an operator makes."""
        for t in tensors:
            storage = t.untyped_storage()
            key = storage._cdata
            if t.is_cuda and storage.nbytes() and key not in self._storages:
                self._storages[key] = weakref.ref(storage, functools.partial(self._released, key))
                self.memory.allocate(key, storage.nbytes())

    def note_wait(self, what: str) -> None:
        """For `fake_cuda.card`: something waits for the whole device."""
        self.syncs.append(Finding(what, where()))

    def _released(self, key: int, _: Any) -> None:
        del self._storages[key]
        self.memory.release(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet is aten._pin_memory:  # FakeTensorMode knows no pinned memory
            pinned = args[0].clone()
            self._pinned.add(pinned.untyped_storage()._cdata)
            return pinned
        if packet is aten.is_pinned:
            return args[0].untyped_storage()._cdata in self._pinned
        if packet is aten._local_scalar_dense:
            return self._read(args[0])
        try:
            out = func(*args, **kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException):
            self.syncs.append(Finding(f"{func}: the shape of its result depends on values", where()))
            raise
        except RuntimeError as error:
            if "same device" in str(error) or "on the same" in str(error):
                self.mixes.append(Finding(f"{func}: a CPU tensor in a GPU operator", where()))
            raise
        if packet in COPIES:
            self._check_copy(packet, args, kwargs, out)
        if packet in INDEXING and args[0].is_cuda:
            self._check_index(func, args[1])
        self.hold(*(t for t in tree_leaves(out) if isinstance(t, Tensor)))
        if packet not in NO_KERNEL and not func.is_view and (launch := Launch.of(func, args, kwargs, out)) is not None:
            self._count(launch)
        return out

    def _read(self, x: Tensor) -> bool | float | int:
        """A value that the host asks for; any will do, since none was computed."""
        if x.is_cuda:
            self.syncs.append(Finding("a value of a GPU tensor is read: item(), float(), bool(), if", where()))
        return True if x.dtype is torch.bool else 1.0 if x.is_floating_point() else 1

    def _check_copy(self, packet: Any, args: Any, kwargs: Any, out: Any) -> None:
        source, target = (args[1], args[0]) if packet is aten.copy_ else (args[0], out)
        if not isinstance(source, Tensor) or source.device.type == target.device.type:
            return
        positional = packet is aten.copy_ and len(args) > 2 and args[2]
        host = source if target.is_cuda else target
        if not (kwargs.get("non_blocking") or positional):
            self.syncs.append(Finding(f"a blocking copy {source.device.type} -> {target.device.type}", where()))
        elif target.is_cuda and host.untyped_storage()._cdata not in self._pinned:
            self.syncs.append(Finding("a non_blocking copy from memory that is not pinned", where()))

    def _check_index(self, func: Any, indices: Any) -> None:
        for index in tree_leaves(indices):
            if not isinstance(index, Tensor):
                continue
            if index.dtype in (torch.bool, torch.uint8):
                self.syncs.append(Finding(f"{func} with a mask: the host must know how many are set", where()))
            elif not index.is_cuda:
                self.syncs.append(Finding(f"{func} with an index on the CPU", where()))

    def _count(self, launch: Launch) -> None:
        costs = self.costs
        if launch.format is not None:
            costs.products[str(launch.format).removeprefix("torch.")] += 1
        costs.launches += launch.count
        costs.bytes_moved += launch.moved
        costs.operators[launch.name] += launch.count
        costs.seconds[launch.name] += self.roofline.seconds(launch)


def where() -> str:
    """`file:line function` of the innermost frame that belongs neither to torch nor to this folder."""
    beyond = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(beyond):
            return f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
    return "unknown"
