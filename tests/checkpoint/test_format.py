"""Checkpoints that were written long ago: every version of the format that was ever released is read, to the last bit.

A new version adds a folder here, made by `commit_of(folder, ranks_of(counted(), 2, 2, True), step=3, ...)`; none is
ever made again.
"""

from pathlib import Path

import pytest
import torch

from megatrain.checkpoint.manifest import VERSION
from megatrain.checkpoint.read import find
from tests.checkpoint.toy import SPECS, STATES, Toy

FROZEN = Path(__file__).parent / "frozen"


def counted() -> dict[tuple[str, str], torch.Tensor]:
    """Values that need no random generator to be known again."""
    return {
        (state, spec.name): (torch.arange(torch.Size(spec.shape).numel()).view(spec.shape) + 1000.0 * i + j / 8)
        for i, state in enumerate(STATES)
        for j, spec in enumerate(SPECS)
    }


@pytest.mark.parametrize("version", range(1, VERSION + 1))
def test_a_frozen_checkpoint_is_read_to_the_last_bit(version):
    reader = find(FROZEN / f"version-{version}").reader()
    assert (reader.step, reader.state) == (3, {"tokens": 300, "cursors": [[0, 1]]})
    assert reader.facts["config"] == {"seed": 7}
    toy = Toy()
    toy.load(reader.fill)
    assert all(torch.equal(toy.tensors[key], values) for key, values in counted().items())
