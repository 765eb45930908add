"""The kernel behind AdamW on a GPU: the paper's algorithm, and small enough to run without spilling."""

import math

import pytest

from megatrain.audit.kernels import SHARED_LIMIT, resources
from megatrain.optim import adamw_kernel
from tests import interpreted

TYPES = {"table": "*i64", "count": "*fp32", "divisor": "*fp32", "found_inf": "*fp32", "lr": "fp32", "decay": "fp32"}
CONSTANTS = {
    "beta1": 0.9,
    "beta2": 0.95,
    "log2_beta1": math.log2(0.9),
    "log2_beta2": math.log2(0.95),
    "eps": 1e-8,
    "n": 256,
    "tile": adamw_kernel.TILE,
    "block": adamw_kernel.BLOCK,
}


def test_the_interpreted_kernel_makes_the_papers_step() -> None:
    """Against float64: tensors that fill no tile, several, none; at odd addresses; with bf16 copies; refused steps."""
    interpreted.assert_equal("tests.optim.interpreted_adamw")


@pytest.mark.parametrize("architecture", SHARED_LIMIT)
@pytest.mark.parametrize("aligned", [True, False])
def test_the_kernel_fits_its_card_without_spilling(aligned: bool, architecture: int) -> None:
    constants = CONSTANTS | {"copying": True, "aligned": aligned}
    found = resources(adamw_kernel.step_kernel, TYPES, constants, architecture, num_warps=adamw_kernel.WARPS)
    assert found.spilled == 0
    assert found.fits
