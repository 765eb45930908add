"""Kernels in Triton's interpreter, which a process chooses once: programs of this folder that print `equal`."""

import subprocess
import sys
from pathlib import Path


def assert_equal(program: str) -> None:
    """Run the module, such as `tests.nn.interpreted_norm`, which compares a kernel with what it should give."""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-m", program], cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "equal", done.stderr[-3000:]
