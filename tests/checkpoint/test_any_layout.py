"""Whatever layout wrote a checkpoint, every layout reads from it the values that it holds."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatrain.base.errors import CheckpointError
from megatrain.checkpoint.checkpoints import differences
from megatrain.checkpoint.manifest import tiling_problem
from megatrain.parallel.shard import Box, Slice
from tests.checkpoint.toy import SPECS, STATES, Spec, Toy, commit_of, full_tensors, ranks_of

LAYOUTS = [(tp, dp, zero) for tp in (1, 4) for dp in (1, 3) for zero in (False, True)]


@pytest.mark.parametrize("writer", [(1, 1, False), (2, 2, True), (4, 1, False), (2, 3, True), (1, 3, False)])
def test_every_layout_reads_what_any_layout_wrote_to_the_last_bit(writer, tmp_path):
    full = full_tensors()
    commit = commit_of(tmp_path, ranks_of(full, *writer), file_bytes=500)
    assert commit.damage() == []
    reader = commit.reader()
    for tp, dp, zero in LAYOUTS:
        for wanted, found in zip(ranks_of(full, tp, dp, zero), ranks_of(None, tp, dp, zero), strict=True):
            found.load(reader.fill)
            for ours, theirs in zip(found.slices(), wanted.slices(), strict=True):
                assert torch.equal(ours.values, theirs.values), (ours.state, ours.name, ours.box)
    for (state, name), values in full.items():
        assert torch.equal(reader.read_full(name, state), values)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7)),
    writer_dim=st.integers(0, 3), reader_dim=st.integers(0, 3), dp=st.integers(1, 5), data=st.data(),
)  # fmt: skip
def test_a_tensor_cut_along_one_dimension_is_read_along_another(
    shape, writer_dim, reader_dim, dp, data, tmp_path_factory
):
    """The two see the tensor as matrices of different widths; any flat range must still be found."""
    specs = [(Spec("x", shape, dim if dim < 3 else None),) for dim in (writer_dim, reader_dim)]
    full = full_tensors(specs[0])
    commit = commit_of(tmp_path_factory.mktemp("c"), ranks_of(full, 1, dp, True, specs[0]))
    rank, size = data.draw(st.integers(0, 2)), 3
    wanted, found = (Toy(of, dp=(rank, size), zero=True, specs=specs[1]) for of in (full, None))
    found.load(commit.reader().fill)
    for ours, theirs in zip(found.slices(), wanted.slices(), strict=True):
        assert torch.equal(ours.values, theirs.values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_every_dtype_comes_back_as_it_was(dtype, tmp_path):
    full = full_tensors(dtype=dtype)
    reader = commit_of(tmp_path, [Toy(full)]).reader()
    for (state, name), values in full.items():
        found = reader.read_full(name, state)
        assert found.dtype == dtype
        assert torch.equal(
            found.view(torch.uint8) if found.dim() else found, values.view(torch.uint8) if values.dim() else values
        )


def test_dtypes_of_all_widths_share_a_file(tmp_path):
    dtypes = [torch.uint8, torch.float64, torch.bfloat16, torch.int32, torch.bool, torch.int64]
    tensors = {f"{dtype}": torch.arange(3).to(dtype) for dtype in dtypes}

    class Mixed:
        def slices(self):
            for name, x in tensors.items():
                yield Slice("weights", name, (3,), (1, 3), Box(0, 1, 0, 3), x.view(1, 3), True)

    reader = commit_of(tmp_path, [Mixed()]).reader()
    for name, x in tensors.items():
        assert torch.equal(reader.read_full(name), x)


def test_plain_safetensors_reads_a_file_of_one_process(tmp_path):
    full = full_tensors()
    commit_of(tmp_path, [Toy(full)])
    found = load_file(tmp_path / "step-00000001" / "rank-00000-000.safetensors")
    assert {tuple(key.split("/", 1)) for key in found} == set(full)
    assert all(torch.equal(found["/".join(key)], values) for key, values in full.items())


def test_pieces_of_a_fused_weight_are_stored_as_one(tmp_path):
    """q, k and v are three ranges of a shard, along whichever dimension; in one process they are one tensor."""
    for layout, expected in (((1, 1, False), 1), ((2, 1, False), 3 * 2), ((1, 2, True), 2)):
        manifest = commit_of(tmp_path / str(layout), ranks_of(full_tensors(), *layout)).manifest
        assert len(manifest.tensors["weights", "layers.0.attention.qkv.weight"].slices) <= expected
    one = commit_of(tmp_path / "one", [Toy(full_tensors())]).manifest
    assert {len(t.slices) for t in one.tensors.values()} == {1}


def test_plain_safetensors_accepts_the_files_of_many_ranks(tmp_path):
    full = full_tensors()
    commit_of(tmp_path, ranks_of(full, 2, 2, True), file_bytes=300)
    files = sorted((tmp_path / "step-00000001").glob("*.safetensors"))
    assert len(files) > 4
    assert sum(x.numel() for file in files for x in load_file(file).values()) == sum(x.numel() for x in full.values())


def test_no_file_grows_beyond_its_limit_unless_one_tensor_does(tmp_path):
    commit = commit_of(tmp_path, ranks_of(full_tensors(), 1, 1, False), file_bytes=600)
    for file in commit.manifest.files.values():
        n = sum(s.file == file.name for t in commit.manifest.tensors.values() for s in t.slices)
        assert file.bytes - file.header_bytes <= 600 or n == 1


def test_what_is_saved_again_after_loading_has_the_same_bits(tmp_path):
    writers = ranks_of(full_tensors(), 2, 2, True)
    commit_of(tmp_path / "a", writers)
    reader = commit_of(tmp_path / "b", ranks_of(full_tensors(), 1, 3, True)).reader()
    again = ranks_of(None, 2, 2, True)
    for toy in again:
        toy.load(reader.fill)
    commit_of(tmp_path / "c", again)
    first = {p.name: p.read_bytes() for p in (tmp_path / "a" / "step-00000001").iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "c" / "step-00000001").iterdir()} == first


def test_a_tensor_with_a_hole_or_a_double_is_not_committed(tmp_path):
    toys = ranks_of(full_tensors(), 2, 1, False)
    with pytest.raises(CheckpointError, match=r"embedding.weight: 24 of 48 elements were written"):
        commit_of(tmp_path / "hole", toys[:1])
    with pytest.raises(CheckpointError, match=r"is written twice"):
        commit_of(tmp_path / "double", [*toys, toys[1]])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_sweep_over_boxes_agrees_with_counting_every_element(data):
    rows, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    boxes, todo = [], [Box(0, rows, 0, columns)]
    while todo:  # a random tiling ...
        box = todo.pop()
        if box.numel > 1 and data.draw(st.booleans()):
            if box.n_rows > 1:
                k = data.draw(st.integers(1, box.n_rows - 1))
                todo += [Box(box.row, k, box.column, box.n_columns)]
                todo += [Box(box.row + k, box.n_rows - k, box.column, box.n_columns)]
            else:
                k = data.draw(st.integers(1, box.n_columns - 1))
                todo += [Box(box.row, 1, box.column, k), Box(box.row, 1, box.column + k, box.n_columns - k)]
        else:
            boxes.append(box)
    if data.draw(st.booleans()):  # ... in half of the cases with one box exchanged for another
        boxes[data.draw(st.integers(0, len(boxes) - 1))] = Box(
            r := data.draw(st.integers(0, rows - 1)), data.draw(st.integers(1, rows - r)),
            c := data.draw(st.integers(0, columns - 1)), data.draw(st.integers(1, columns - c)),
        )  # fmt: skip
    boxes = data.draw(st.permutations(boxes))
    seen = torch.zeros(rows, columns, dtype=torch.int)
    for b in boxes:
        seen[b.row : b.row + b.n_rows, b.column : b.column + b.n_columns] += 1
    assert (tiling_problem((rows, columns), boxes) == "") == bool((seen == 1).all())


def test_a_box_outside_of_the_tensor_is_a_problem():
    assert "outside" in tiling_problem((2, 2), [Box(0, 2, 0, 2), Box(2, 1, 0, 1)])


def test_unknown_names_other_shapes_and_other_dtypes_are_refused(tmp_path):
    reader = commit_of(tmp_path, [Toy(full_tensors())]).reader()
    values = torch.empty(1, 4)
    ask = Slice("weights", "layers.0.norm.weight", (4,), (1, 4), Box(0, 1, 0, 4), values, True)
    reader.fill(ask)
    for change, message in [
        ({"name": "layers.0.nrm.weight"}, "did you mean layers.0.norm.weight"),
        (
            {"state": "momentum"},
            r"holds no momentum of layers.0.norm.weight, .*\(it holds exp_avg, exp_avg_sq, w",
        ),
        ({"full_shape": (2, 2)}, r"has shape \[4\] in step-00000001 and \[2, 2\] in this model"),
        (
            {"values": values.bfloat16()},
            "saved as F32, and this run keeps BF16: keep the precision, or add precision.parameters to",
        ),
    ]:
        with pytest.raises(CheckpointError, match=message):
            reader.fill(Slice(**(vars(ask) | change)))


def test_another_dtype_is_filled_where_casting_is_asked_for(tmp_path):
    full = full_tensors()
    reader = commit_of(tmp_path, [Toy(full)]).reader(cast=True)
    toy = Toy(dtype=torch.bfloat16)
    toy.load(reader.fill)
    assert torch.equal(toy.tensors["weights", "embedding.weight"], full["weights", "embedding.weight"].bfloat16())


def test_the_reader_lists_states_names_and_shapes(tmp_path):
    reader = commit_of(tmp_path, ranks_of(full_tensors(), 2, 1, False)).reader()
    assert reader.states() == sorted(STATES)
    assert reader.shapes() == {s.name: s.shape for s in SPECS}


def test_differences_name_what_is_missing_extra_and_of_another_shape():
    found = differences({"a": (1,), "b": (2,), "c": (3, 4)}, {"b": (2,), "c": (4, 3), "d": (1,)})
    assert found == [
        "1 weights of the model are not in it: d",
        "1 of its weights are not in the model: a",
        "1 have another shape: c [3, 4] in it, [4, 3] in the model",
    ]
    assert differences({"a": (1,)}, {"a": (1,)}) == []


def test_reading_maps_the_file_and_does_not_load_it(tmp_path):
    """A rank that wants one column of a large tensor touches that column's pages alone, and cannot change the file."""
    full = {(s, "x"): torch.arange(64.0).view(8, 8) for s in STATES}
    commit = commit_of(tmp_path, [Toy(full, specs=(Spec("x", (8, 8), 1),))])
    (file,) = Path(tmp_path / "step-00000001").glob("*.safetensors")
    before = file.read_bytes()
    stored = commit.manifest.tensors["weights", "x"].slices[0]
    view = commit.storage.read(f"step-00000001/{file.name}", stored.begin, stored.begin + 16)
    view[:4] = b"\0\0\0\1"
    assert file.read_bytes() == before
