"""The collectives of a step, counted by axis and operation, whoever calls them.

    with Communication(group_names(mesh.groups)) as seen:
        engine.step(batch, lr)
    seen.traffic["tp", "all_gather"]          # Traffic(calls=20, bytes=...)

It sees what torch dispatches: functional collectives, those of torch.distributed, and so DeepSpeed's and fully_shard's.
Inside of a compiled graph torch hides them.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

OPERATIONS = {
    "_c10d_functional.all_reduce": "all_reduce",
    "_c10d_functional.all_reduce_": "all_reduce",
    "_c10d_functional.all_gather_into_tensor": "all_gather",
    "_c10d_functional.reduce_scatter_tensor": "reduce_scatter",
    "_c10d_functional.all_to_all_single": "all_to_all",
    "c10d.allreduce_": "all_reduce",
    "c10d.allreduce_coalesced_": "all_reduce",
    "c10d.allgather_": "all_gather",
    "c10d._allgather_base_": "all_gather",
    "c10d.allgather_into_tensor_coalesced_": "all_gather",
    "c10d.reduce_scatter_": "reduce_scatter",
    "c10d._reduce_scatter_base_": "reduce_scatter",
    "c10d.reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "c10d.alltoall_base_": "all_to_all",
    "c10d.alltoall_": "all_to_all",
    "c10d.broadcast_": "broadcast",
    "c10d.reduce_": "reduce",
    "c10d.gather_": "gather",
    "c10d.scatter_": "scatter",
    "c10d.send": "send",
    "c10d.recv_": "recv",
    "c10d.barrier": "barrier",
}
"""Names of torch's operators, and ours."""


@dataclass(frozen=True)
class Traffic:
    """`bytes` of the whole tensor that is reduced, gathered, dealt out or exchanged, as one rank sees it."""

    calls: int = 0
    bytes: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.calls + other.calls, self.bytes + other.bytes)

    def __mul__(self, n: int) -> "Traffic":
        return Traffic(self.calls * n, self.bytes * n)


def group_names(groups: Mapping[str, Any]) -> dict[str, str]:
    """Axis by the name that torch knows its process group by, from a connected mesh's groups."""
    return {group.group_name: axis for axis, group in groups.items()}


class Communication(TorchDispatchMode):
    """Counts while it is entered; groups that are none of `names` are counted under "other"."""

    def __init__(self, names: Mapping[str, str]):
        super().__init__()
        self.names = names
        self.calls: list[tuple[str, str, int]] = []
        """(axis, operation, bytes) in order: ranks of one group whose lists differ wait for each other for ever."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # torch.compile would skip every frame while this mode is on

    @property
    def traffic(self) -> dict[tuple[str, str], Traffic]:
        """All calls of an axis and operation together."""
        found: dict[tuple[str, str], Traffic] = defaultdict(Traffic)
        for axis, operation, n_bytes in self.calls:
            found[axis, operation] += Traffic(1, n_bytes)
        return found

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        operation = OPERATIONS.get(str(op.overloadpacket))
        if operation is not None:
            axis = self.names.get(_group_of((*args, *kwargs.values())), "other")
            self.calls.append((axis, operation, _bytes_of(operation, args, kwargs)))
        return op(*args, **kwargs)


def _group_of(args: tuple) -> str:
    """The name of the group among the arguments of a collective."""
    for arg in args:
        if isinstance(arg, str) and arg.lower() not in ("sum", "avg", "max", "min", "product"):
            return arg
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return dist.ProcessGroup.unbox(arg).group_name
    raise LookupError(f"no process group among {args}")


def _bytes_of(operation: str, args: tuple, kwargs: dict) -> int:
    """Bytes of the largest side: inputs and outputs are among the arguments, apart from what is returned."""
    sizes = []
    ranks = 1
    for arg in (*args, *kwargs.values()):
        if isinstance(arg, Tensor):
            sizes.append(arg.nbytes)
        elif isinstance(arg, list | tuple) and arg and all(isinstance(x, list | tuple | Tensor) for x in arg):
            sizes.append(sum(_nbytes(x) for x in arg))
        elif isinstance(arg, int) and not isinstance(arg, bool) and operation == "all_gather":
            ranks = max(ranks, arg)  # a functional gather is given its input and the number of ranks
    return max(sizes, default=0) * (ranks if len(sizes) == 1 else 1)


def _nbytes(x: Any) -> int:
    return x.nbytes if isinstance(x, Tensor) else sum(_nbytes(y) for y in x)
