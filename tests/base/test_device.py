"""What a process does with its device's memory."""

import json
import subprocess
import sys

PROGRAM = """
import ctypes, json, sys
import torch
from megatrain.base.device import Device

FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()

class Allocator(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Allocator

if "kept" in sys.argv:
    Device("cpu").use()
lent = mallinfo2().hblkhd
pieces = [torch.ones(5_000_000) for _ in range(10)]
lent = mallinfo2().hblkhd - lent
del pieces
print(json.dumps({"lent": lent, "kept": mallinfo2().fordblks}))
"""


def after_a_step(*words: str) -> dict[str, int]:
    """Bytes of ten pieces of 20 MB: what the system lends for each alone, and what glibc keeps once all are freed."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_memory_that_a_step_frees_on_a_cpu_is_there_for_the_next() -> None:
    found = after_a_step("kept")
    assert found["lent"] == 0
    assert found["kept"] >= 200e6
    left_alone = after_a_step()
    assert left_alone["lent"] >= 200e6
    assert left_alone["kept"] < 50e6
