"""What a Triton kernel would occupy on a card, from the machine code that is made for it here, without one."""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that one block may use, by architecture: A100, H100, B200."""


@dataclass(frozen=True)
class Resources:
    """Of one program (block) of a compiled kernel."""

    target: str
    registers: int
    """Of one thread."""
    spilled: int
    """Bytes that did not fit into registers and are stored to memory."""
    shared: int
    """Bytes of shared memory."""
    fits: bool
    """A card of that architecture would launch it."""


def resources(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], architecture: int, **options: int
) -> Resources:
    """Compile `kernel` for sm_<architecture> and read back what it takes.

    Args:
        types: of each argument that is no constant, as Triton writes them: "*bf16", "*i64", "i32", "fp32".
        constants: values of the constexpr arguments.
        options: num_warps, num_stages.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name, "f")[0] in "*i"}
    source = triton.compiler.ASTSource(kernel, signature, dict(constants), aligned)
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    code = built.asm["ptx"]
    found = re.search(r"^\.target (\w+)", code, re.MULTILINE)
    assert found is not None
    said = _assembler_says(code, found[1], Path(triton.__file__).parent, architecture)
    shared = built.metadata.shared
    return Resources(
        target=found[1],
        registers=_number(r"Used (\d+) registers", said),
        spilled=_number(r"(\d+) bytes spill stores", said),
        shared=shared,
        fits=shared <= SHARED_LIMIT[architecture],
    )


def _assembler_says(code: str, target: str, triton: Path, architecture: int) -> str:
    assembler = triton / "backends/nvidia/bin" / ("ptxas-blackwell" if architecture >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(code)
        command = [str(assembler), "-v", f"--gpu-name={target}", str(path), "-o", str(path.with_suffix(".cubin"))]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0
