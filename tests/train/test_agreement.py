"""Ranks that differ are refused at the start, and copies that drift apart are named."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatrain.base.device import Device
from megatrain.base.errors import ConfigError, RunError
from megatrain.checkpoint.exchange import Exchange
from megatrain.engine.layout import Layout
from megatrain.parallel.mesh import Mesh
from megatrain.train.agreement import checksum, drifted, refuse_disagreement, refuse_drift
from megatrain.train.build import build_engine
from megatrain.train.check import refuse
from megatrain.train.config import read_run
from tests.ranks import run
from tests.train.small import write_run


def connected(**axes: int) -> Mesh:
    return Mesh.of(**axes).at(dist.get_rank()).connect()


def disagreement(odd_one: int | None) -> str:
    exchange = Exchange(connected(dp=dist.get_world_size()).axis("world"))
    lr = 0.02 if dist.get_rank() == odd_one else 0.01
    try:
        refuse_disagreement({"config": {"optimizer": {"lr": lr}}, "versions": {"torch": "2.13"}}, exchange)
    except ConfigError as error:
        return str(error)
    return ""


def test_equal_ranks_agree_and_a_different_one_is_named_on_every_rank() -> None:
    assert run(disagreement, 3, None) == ["", "", ""]
    first, *others = run(disagreement, 3, 2)
    assert "ranks do not agree on config.optimizer.lr: rank 0 has 0.01, rank 2 has 0.02" in first
    assert others == [first, first]


def drift(path: str, layout: Layout, damaged: int | None) -> tuple[list[str], str]:
    found = dataclasses.replace(read_run(path).run, layout=layout)
    mesh = layout.mesh(dist.get_world_size()).at(dist.get_rank()).connect()
    engine: Any = build_engine(found, refuse(found, mesh.size)[0].tokenizer, mesh, Device.of("cpu"))
    exchange = Exchange(mesh.axis("world"))
    before = drifted(engine, exchange)
    if dist.get_rank() == damaged:
        weight = engine.model.layers["1"].feed_forward_norm.weight
        weight.data.view(torch.int32)[5] ^= 1  # one bit
    try:
        refuse_drift(engine, exchange, 7)
        words = ""
    except RunError as error:
        words = str(error)
    return before, words


@pytest.mark.parametrize("axes", [{"dp": 2}, {"tp": 2, "dp": 1}], ids=["data parallel", "tensor parallel"])
def test_one_flipped_bit_in_a_copy_is_found_and_named(tmp_path: Path, text_data: Path, axes: dict[str, int]) -> None:
    path = str(write_run(tmp_path, text_data))
    layout = Layout(engine="plain", micro_batch=2, **axes)
    assert run(drift, 2, path, layout, None) == [([], "")] * 2
    for before, words in run(drift, 2, path, layout, 1):
        assert before == []
        assert "layers.1.feed_forward_norm.weight: ranks [0] and ranks [1] hold different values" in words


def test_the_checksum_sees_single_values_and_their_order() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        value = x.to(dtype)
        changed, swapped = value.clone(), value.clone()
        changed[123] += 1
        swapped[[3, 700]] = value[[700, 3]]
        assert len({checksum(value), checksum(changed), checksum(swapped)}) == 3
        assert checksum(value) == checksum(value.clone().view(10, 100))
