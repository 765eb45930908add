"""The mesh as arithmetic, and shards as rectangles of full tensors. Nothing here opens a socket."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatrain.base.errors import LayoutError
from megatrain.parallel.mesh import COMBINED, ORDER, Mesh, divisors
from megatrain.parallel.shard import Part, Shard, constant, initialise, normal, parameter, shards, slices_of

SIZES = st.tuples(*[st.integers(1, 3)] * 4)


@st.composite
def meshes(draw) -> Mesh:
    pp, dp, cp, tp = draw(SIZES)
    ep = draw(st.sampled_from(divisors(dp * cp)))
    return Mesh.of(pp=pp, dp=dp, cp=cp, tp=tp, ep=ep)


# ------------------------------------------------------------------------------------------------ mesh


@given(meshes(), st.sampled_from([*ORDER, "ep", *COMBINED]))
def test_every_rank_is_in_exactly_one_row_of_each_axis(mesh, name):
    rows = {mesh.at(rank).axis(name).ranks for rank in range(mesh.size)}
    assert sorted(rank for row in rows for rank in row) == list(range(mesh.size))
    for rank in range(mesh.size):
        axis = mesh.at(rank).axis(name)
        assert axis.ranks[axis.rank] == rank
        assert axis.size == len(axis.ranks)
        assert axis.group is None


@given(meshes())
def test_axes_are_as_long_as_the_layout_says(mesh):
    sizes = {"pp": mesh.pp, "dp": mesh.dp, "cp": mesh.cp, "tp": mesh.tp, "ep": mesh.ep}
    sizes |= {"data": mesh.dp * mesh.cp, "model": mesh.pp * mesh.tp, "world": mesh.size}
    assert {name: mesh.axis(name).size for name in sizes} == sizes


@given(meshes())
def test_coordinates_and_ranks_tell_the_same_story(mesh):
    for rank in range(mesh.size):
        at = mesh.at(rank)
        place = at.coordinates
        by_hand = ((place["pp"] * mesh.dp + place["dp"]) * mesh.cp + place["cp"]) * mesh.tp + place["tp"]
        assert by_hand == rank
        assert {name: at.axis(name).rank for name in ORDER} == place


@given(meshes())
def test_experts_are_spread_over_ranks_that_hold_the_same_parameters(mesh):
    for rank in range(mesh.size):
        at = mesh.at(rank)
        assert set(at.axis("ep").ranks) <= set(at.axis("data").ranks)


def test_rank_13_of_a_known_mesh():
    mesh = Mesh.of(pp=2, dp=4, tp=8).at(rank=13)
    assert mesh.coordinates == {"pp": 0, "dp": 1, "cp": 0, "tp": 5}
    assert mesh.axis("tp").ranks == (8, 9, 10, 11, 12, 13, 14, 15)  # neighbours in a node
    assert mesh.axis("dp").ranks == (5, 13, 21, 29)
    assert mesh.axis("pp").ranks == (13, 45)


def test_layouts_that_cannot_be_are_refused():
    with pytest.raises(LayoutError, match="tp=0: a mesh axis has at least 1 rank"):
        Mesh.of(tp=0)
    with pytest.raises(LayoutError, match=r"ep=4 does not divide dp x cp = 3 x 2: pick ep from \[1, 2, 3, 6\]"):
        Mesh.of(dp=3, cp=2, ep=4)
    with pytest.raises(LayoutError, match="rank 2 is not in a mesh of 2 ranks"):
        Mesh.of(dp=2).at(2)
    with pytest.raises(LayoutError, match=r"n_heads=6 cannot be split over tp=4: pick tp from \[1, 2, 3, 6\]"):
        Mesh.of(tp=4).axis("tp").part(6, "n_heads")


@given(st.integers(1, 8), st.integers(1, 8))
def test_parts_of_all_ranks_cover_the_whole_in_order(size, each):
    parts = [Mesh.of(tp=size).at(rank).axis("tp").part(size * each, "heads") for rank in range(size)]
    assert parts == [(rank * each, (rank + 1) * each) for rank in range(size)]


# ------------------------------------------------------------------------------------------------ shards


@st.composite
def cut_tensors(draw) -> tuple[tuple[int, ...], int, list[list[Part]]]:
    """A full shape, the cut dimension, and a division of it among ranks: several ranges a rank, in any order."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    dim = draw(st.integers(0, len(shape) - 1))
    edges = sorted({0, shape[dim], *draw(st.lists(st.integers(0, shape[dim]), max_size=4))})
    ranges = draw(st.permutations([Part(a, b) for a, b in itertools.pairwise(edges)]))
    n_ranks = draw(st.integers(1, max(1, len(ranges))))
    return shape, dim, [list(ranges[rank::n_ranks]) for rank in range(n_ranks)]


@given(cut_tensors())
def test_the_parts_of_all_ranks_make_up_the_full_tensor(case):
    shape, dim, ranks = case
    full = torch.arange(math.prod(shape)).view(shape)
    again = torch.full(shape, -1)
    for parts in ranks:
        shard = Shard(shape, constant(0), dim, tuple(parts))
        local = shard.cut(full)
        assert local.shape == shard.local_shape
        assert local.data_ptr() != full.data_ptr()
        at = 0
        for part in parts:
            width = part.stop - part.start
            again.narrow(dim, part.start, width).copy_(local.narrow(dim, at, width))
            at += width
        assert shard.whole == torch.equal(local, full)
    assert torch.equal(again, full)


@given(cut_tensors(), st.data())
def test_the_boxes_of_any_flat_range_address_its_values_in_the_full_matrix(case, data):
    shape, dim, ranks = case
    full = torch.arange(math.prod(shape)).view(shape)
    rows = math.prod(shape[:dim])
    matrix = full.view(rows, -1)
    for parts in ranks:
        shard = Shard(shape, constant(0), dim, tuple(parts))
        flat = shard.cut(full).flatten()
        start = data.draw(st.integers(0, flat.numel()))
        stop = data.draw(st.integers(start, flat.numel()))
        found, at = [], 0
        for piece in shard.boxes(start, stop - start):
            box = piece.box
            assert piece.offset == at  # flat order, without gaps
            assert box.numel > 0
            values = matrix[box.row : box.row + box.n_rows, box.column : box.column + box.n_columns]
            assert values.shape == (box.n_rows, box.n_columns)  # inside the full matrix
            found.append(values.flatten())
            at += box.numel
        assert torch.equal(torch.cat(found) if found else flat[:0], flat[start:stop])


@given(cut_tensors(), st.integers(1, 4))
def test_writing_slices_fills_a_full_tensor_and_reading_them_fills_the_local_ones(case, pieces):
    shape, dim, ranks = case
    full = torch.arange(math.prod(shape)).view(shape)
    saved = torch.full_like(full, -1)
    for parts in ranks:
        shard = Shard(shape, constant(0), dim, tuple(parts))
        local = shard.cut(full).flatten()
        loaded = torch.full_like(local, -1)
        size = -(-local.numel() // pieces)
        for start in range(0, local.numel(), size):
            ours, theirs = (slices_of("weights", "w", shard, t[start : start + size], start) for t in (local, loaded))
            for slice_, into in zip(ours, theirs, strict=True):
                box = slice_.box
                place = saved.view(slice_.matrix)[
                    box.row : box.row + box.n_rows, box.column : box.column + box.n_columns
                ]
                place.copy_(slice_.values)
                into.values.copy_(place)
        assert torch.equal(loaded, local)
    assert torch.equal(saved, full)


def test_a_range_of_whole_rows_is_one_box():
    shard = Shard((6, 4), constant(0), 0, (Part(2, 5),))
    assert [piece.box.numel for piece in shard.boxes()] == [12]
    columns = Shard((6, 4), constant(0), 1, (Part(1, 3),))
    assert [(p.box.row, p.box.n_rows, p.box.column, p.box.n_columns) for p in columns.boxes()] == [(0, 6, 1, 2)]


def test_copies_are_told_from_what_counts():
    shard = Shard((2, 4), constant(0), 1, (Part(0, 1), Part(2, 4, counted=False)))
    assert [piece.counted for piece in shard.boxes()] == [True, False, True, False]


def test_swapped_parts_are_not_the_whole_tensor():
    shard = Shard((4,), constant(0), 0, (Part(2, 4), Part(0, 2)))
    assert not shard.whole
    assert shard.cut(torch.arange(4)).tolist() == [2, 3, 0, 1]


# ------------------------------------------------------------------------------------------------ first weights


def model(*parts: Part) -> torch.nn.Module:
    module = torch.nn.Module()
    module.weight = parameter(Shard((6, 3), normal(0.02), 0, parts))
    module.bias = parameter(Shard((6,), constant(1.0), 0, parts))
    return module


def test_first_weights_do_not_depend_on_the_layout():
    whole, left, right = model(Part(0, 6)), model(Part(0, 2)), model(Part(2, 6))
    for m in (whole, left, right):
        initialise(m, seed=7)
    assert torch.equal(torch.cat([left.weight, right.weight]), whole.weight)
    assert torch.equal(whole.bias, torch.ones(6))
    assert whole.weight.std() > 0.005
    assert set(shards(left)) == {"weight", "bias"}


def test_first_weights_depend_on_seed_and_name_only():
    one, other = model(Part(0, 6)), model(Part(0, 6))
    initialise(one, seed=7)
    torch.manual_seed(99)
    initialise(other, seed=7)
    assert torch.equal(one.weight, other.weight)
    initialise(other, seed=8)
    assert not torch.equal(one.weight, other.weight)
