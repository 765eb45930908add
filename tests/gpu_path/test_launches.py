"""What the audit says that an operator moves and computes is what its definition says."""

import functools
from typing import Any

import pytest

from megatrain.audit.roofline import H100
from tests.gpu_path.test_step import lines_of


@functools.cache
def seen() -> dict[str, dict[str, Any]]:
    return lines_of(program="launches")[0]


MOVED = {
    "mm": 2 * (32 * 16 + 16 * 8 + 32 * 8),
    "mm into": 2 * (32 * 16 + 16 * 8 + 32 * 8),  # what is written over is not read
    "addmm": 2 * (32 * 16 + 16 * 8) + 2 * 4 * 32 * 8,  # and what is added to is
    "copy_": (2 + 4) * 50,
    "foreach_copy_": (2 + 4) * 50,
    "add_": 3 * 2 * 50,
    "broadcast": 2 * (50 + 2 * 50 * 40),
    "embedding": 8 * 7 + 2 * 2 * 7 * 10,  # seven rows of a hundred
    "index_add_": 3 * 2 * 7 * 10,
    "compiled": 3 * 2 * 64 * 64,
    "view": 0,
    "on the CPU": 0,
}


@pytest.mark.parametrize("name", MOVED)
def test_an_operator_moves_each_operand_once(name: str) -> None:
    assert seen()[name]["moved"] == MOVED[name]


def test_a_fused_optimiser_writes_gradients_only_where_it_divides_them() -> None:
    """Parameter, both moments: read and written; the gradient read. 28 bytes, or 32."""
    assert seen()["adamw"]["moved"] // 1000 == 28
    assert seen()["adamw scaled"]["moved"] // 1000 == 32


def test_compiled_code_is_one_launch_that_keeps_nothing_between() -> None:
    found = seen()["compiled"]
    assert found["launches"] == 1
    assert found["names"][0].startswith("triton_poi_fused_add_mul_relu")
    assert found["peak"] == 3 * 2 * 64 * 64


def test_modelled_attention_takes_its_flops_and_half_of_them_if_causal() -> None:
    """Two products forward and five backward, each 2 FLOPs for every query, key and channel."""
    forward, backward = H100.attention[64]
    product = 2 * 2 * 8 * 4096 * 4096 * 64
    kernel = "_scaled_dot_product_flash_attention"
    for name, share in (("attention", 1), ("attention causal", 0.5)):
        seconds = seen()[name]["seconds"]
        assert seconds[kernel] == pytest.approx(share * 2 * product / forward)
        assert seconds[f"{kernel}_backward"] == pytest.approx(share * 5 * product / backward)
