"""Parts of a softmax, as a ring computes them, on a GPU's kernels: FlashAttention wherever it can be."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_parts_of_attention_run_on_the_kernels_of_a_gpu():
    command = [sys.executable, "-m", "tests.gpu_path.parts"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 8
    for case in found:
        kernel = "flash_attention" if case["half"] and not case["masked"] else "efficient_attention"
        assert case["kernels"] == [kernel, f"{kernel}_backward"]
        assert case["right"]
