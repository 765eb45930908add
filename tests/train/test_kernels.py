"""The kernels that a run names when it starts are those that run."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatrain.base.device import Device
from megatrain.nn.attention.kernel import kernel_for, scaled_dot_product
from megatrain.nn.attention.sliding_window import SlidingWindow
from megatrain.train.config import read_run
from megatrain.train.kernels import kernel_table
from tests.train.small import write_run

CPU = Device("cpu")


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("width", "name"), [(8, "FlashAttention"), (8, "plain products and softmax")])
def test_the_kernel_that_is_named_is_the_one_that_runs(masked, width, name):
    q, k = torch.randn(1, 4, 16, width), torch.randn(1, 2, 16, width)
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril() if masked else None
    with torch.nn.attention.sdpa_kernel(
        [torch.nn.attention.SDPBackend.FLASH_ATTENTION]
        if name == "FlashAttention"
        else [torch.nn.attention.SDPBackend.MATH]
    ):
        assert kernel_for(q, k, k, mask, causal=True) == name
        with Operators() as seen:
            scaled_dot_product(q, k, k, mask, causal=True)
    assert ("_scaled_dot_product_flash_attention_for_cpu" in seen.names) == (name == "FlashAttention")


def test_a_run_says_why_its_attention_is_given_a_mask(tmp_path: Path):
    run = read_run(write_run(tmp_path, tmp_path)).run
    assert kernel_table(run, CPU)["attention"] == (
        "FlashAttention with a mask, since documents of one row do not see each other (data.mask_documents)"
    )
    plain = dataclasses.replace(run, data=dataclasses.replace(run.data, mask_documents=False))
    assert kernel_table(plain, CPU) == {"attention": "FlashAttention"}
    window = dataclasses.replace(run.model, attention=SlidingWindow(window=4))
    assert (
        "sliding_window attention does not see all"
        in kernel_table(dataclasses.replace(plain, model=window), CPU)["attention"]
    )


@pytest.mark.parametrize("layout", [{"tp": 2}, {"cp": 2}, {"cp": 2, "cp_kind": "ulysses"}], ids=str)
def test_ranks_that_share_heads_or_tokens_name_a_kernel_too(tmp_path: Path, layout: dict[str, Any]):
    run = read_run(write_run(tmp_path, tmp_path)).run
    shared = dataclasses.replace(run, layout=dataclasses.replace(run.layout, **layout))
    assert kernel_table(shared, CPU)["attention"].startswith("FlashAttention")
