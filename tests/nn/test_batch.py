"""A batch split into micro-batches is the same rows under the same names."""

import torch

from megatrain.nn.batch import Batch
from tests.contract import batch

NAMES = ("tokens", "targets", "weights", "positions", "documents")


def test_micro_batches_are_the_rows_in_order_and_know_their_place():
    whole = batch((3, 5), (8,), (2, 6), (4, 4), (8,), vocab_size=50, step=7)
    parts = list(whole.split(2))
    assert [part.rows for part in parts] == [2, 2, 1]
    assert [part.first_row for part in parts] == [0, 2, 4]
    assert {part.step for part in parts} == {7}
    for name in NAMES:
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_a_part_of_a_part_counts_its_rows_within_the_global_batch():
    whole = batch(*[(8,)] * 8, vocab_size=50)
    second_half = list(whole.split(4))[1]
    assert [part.first_row for part in second_half.split(2)] == [4, 6]


def test_a_batch_where_it_should_be_is_not_copied():
    here = batch((8,), vocab_size=50)
    assert here.to(torch.device("cpu")) is here


def test_a_moved_batch_moves_every_tensor():
    moved = batch((8,), vocab_size=50).to(torch.device("meta"))
    assert isinstance(moved, Batch)
    assert {getattr(moved, name).device.type for name in NAMES} == {"meta"}
