"""Compiled code on a fake card: Inductor writes it for a real one, and its host's part runs on tensors without memory.

    with FakeTensorMode(), fake_cuda.card(), code_for(), without_kernels():
        torch.compile(block)(x)

Allocations, views, library calls and their order are those of the card. A kernel that Inductor wrote is only noted, as
the operator `megatrain_audit::kernel`, so a `Watch` sees a compiled step as it sees any other.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

_OPERATORS = torch.library.Library("megatrain_audit", "FRAGMENT")
_OPERATORS.define("kernel(str name, Tensor[] reads, Tensor[] writes) -> ()")
_OPERATORS.impl("kernel", lambda name, reads, writes: None, "Meta")
_OPERATORS.impl("kernel", lambda name, reads, writes: None, "CUDA")

kernel = torch.ops.megatrain_audit.kernel
"""Stands for a launch of a generated kernel: its name, and the tensors that it reads and writes."""


class _Kernel:
    """What the generated code holds in the place of a kernel. Its arguments say by name what becomes of them."""

    def __init__(self, name: str, source: str):
        self.name = name
        definition = re.search(rf"def {name}\(([^)]*)\)", source)
        assert definition is not None, f"the source of {name} does not define it"
        self.parameters = [word.partition(":")[0].strip() for word in definition[1].split(",")]

    def run(self, *args: Any, **_: Any) -> None:
        given = [(p, x) for p, x in zip(self.parameters, args, strict=False) if isinstance(x, Tensor)]
        reads = [x for p, x in given if not p.startswith("out_ptr")]
        writes = [x for p, x in given if not p.startswith("in_ptr")]
        kernel(self.name, reads, writes)


def _empty(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="cuda")


def _view(x: Tensor, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> Tensor:
    return torch.as_strided(x, size, stride, int(x.storage_offset()) + offset)


class _Module:
    """Generated code, loaded."""

    def __init__(self, code: str):
        names: dict[str, Any] = {"__name__": "generated"}
        with _answers():
            exec(compile(code, "<generated>", "exec"), names)  # Inductor's own output
        self._call: Callable[[list[Any]], Any] = names["call"]

    def call(self, args: list[Any]) -> Any:
        with _answers():
            return self._call(args)


@contextlib.contextmanager
def _answers() -> Iterator[None]:
    """What generated code asks of torch, for tensors without memory."""
    from torch._inductor.async_compile import AsyncCompile

    guards: Any = torch._C._dynamo.guards
    with contextlib.ExitStack() as stack:
        for owner, name, new in (
            (guards, "_empty_strided_cuda", _empty),
            (guards, "_reinterpret_tensor", _view),
            (guards, "assert_size_stride", lambda *_: None),
            (guards, "assert_alignment", lambda *_: None),
            (torch._C, "_cuda_getCurrentRawStream", lambda device: 0),
            (AsyncCompile, "triton", lambda _, name, source, **__: _Kernel(name, source)),
            (AsyncCompile, "wait", lambda *_: None),
        ):
            stack.enter_context(mock.patch.object(owner, name, new, create=True))
        yield


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Let code that Inductor generates run on a fake card, its kernels left out; within `generated.code_for`."""
    from torch._inductor.graph import GraphLowering

    def loaded(graph: Any) -> _Module:
        code, _ = graph.codegen()
        return _Module(code.value)

    with mock.patch.object(GraphLowering, "compile_to_module", loaded):
        yield
