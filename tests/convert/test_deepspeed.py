"""DeepSpeed's checkpoints, written by DeepSpeed itself, read without executing anything in them."""

import argparse
import json
import os
import pickle
import resource
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers

from megatrain.base.errors import CheckpointError
from megatrain.checkpoint.read import find
from megatrain.checkpoint.stream import write_checkpoint
from megatrain.convert.deepspeed import from_deepspeed, to_deepspeed
from megatrain.convert.deepspeed_zero import DeepSpeedFolder
from megatrain.convert.hugging_face import from_hugging_face
from megatrain.convert.pickled import load_pickled
from tests.convert.test_hugging_face import GROUPED, SMALL, make
from tests.ranks import run


def engine_of(theirs: str, stage: int, n_groups: int, frozen: bool = False, **config):
    """DeepSpeed's own engine around the model of transformers."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = transformers.AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32)
    if frozen:
        model.model.layers[0].mlp.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() == 1]}, {"params": [p for p in trained if p.dim() > 1]}]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(groups if n_groups == 2 else trained, lr=1e-2),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "torch_adam": True,
            **config,
        },
        dist_init_required=False,
    )
    return engine


def train_and_save(theirs: str, out: str, stage: int, frozen: bool) -> None:
    """Two parameter groups, two steps, DeepSpeed's own save; rank 0 also leaves what transformers would save."""
    import deepspeed

    engine = engine_of(theirs, stage, 2, frozen)
    for step in range(2):
        tokens = torch.randint(61, (1, 8), generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    engine.save_checkpoint(out)
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters) if stage == 3 else torch.no_grad():
        if dist.get_rank() == 0:
            state = {name: x.detach().clone() for name, x in engine.module.state_dict().items()}
    if dist.get_rank() == 0:
        model = transformers.AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32)
        model.load_state_dict(state)
        model.save_pretrained(f"{out}/expected")


STAGES = [
    pytest.param(0, False, marks=pytest.mark.slow),
    pytest.param(1, False, marks=pytest.mark.slow),
    (2, True),
    (3, False),
]


@pytest.mark.parametrize(("stage", "frozen"), STAGES)
def test_the_weights_of_every_stage_are_those_of_the_model(stage, frozen, tmp_path):
    make(tmp_path / "theirs", "llama", SMALL | GROUPED | {"num_hidden_layers": 2, "tie_word_embeddings": stage == 2})
    run(train_and_save, 2, str(tmp_path / "theirs"), str(tmp_path / "out"), stage, frozen)
    assert from_deepspeed(tmp_path / "out", tmp_path / "theirs", tmp_path / "ours").passed
    from_hugging_face(tmp_path / "out" / "expected", tmp_path / "expected", check=False)
    ours, expected = (find(tmp_path / name).reader() for name in ("ours", "expected"))
    assert ours.shapes() == expected.shapes()
    assert all(torch.equal(ours.read_full(name), expected.read_full(name)) for name in ours.names())
    if stage in (1, 2):
        missing = sorted((tmp_path / "out").glob("global_step2/*rank_1*optim_states.pt"))[0]
        missing.unlink()
        with pytest.raises(CheckpointError, match=r"has 1 of 2 \*_optim_states.pt"):
            DeepSpeedFolder(tmp_path / "out", tmp_path / "theirs")


def load_and_save(theirs: str, source: str, out: str, stage: int, universal: bool) -> float:
    """What DeepSpeed loads, saved by itself; returns its count of steps."""
    n_groups = 2 if universal else 1
    engine = engine_of(theirs, stage, n_groups, checkpoint={"load_universal": universal})
    assert engine.load_checkpoint(source)[0] is not None
    engine.save_checkpoint(out)
    return float(next(iter(engine.optimizer.optimizer.state.values()))["step"])


def assert_same_tensors(a: Path, b: Path) -> None:
    ours, expected = find(a).reader(), find(b).reader()
    assert ours.states() == expected.states() == ["exp_avg", "exp_avg_sq", "weights"]
    for state in ours.states():
        for name in ours.names(state):
            x, y = ours.read_full(name, state), expected.read_full(name, state)
            assert torch.equal(x, y), (state, name)
            assert x.dtype == torch.float32


@pytest.mark.parametrize("stage", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_weights_and_moments_go_to_deepspeed_and_back_with_the_same_bits(stage, tmp_path):
    """Its ZeRO -> ours -> universal and ZeRO 1, 2, each loaded and saved by DeepSpeed itself -> ours."""
    make(tmp_path / "theirs", "llama", SMALL | GROUPED | {"num_hidden_layers": 2, "tie_word_embeddings": stage == 1})
    theirs = str(tmp_path / "theirs")
    run(train_and_save, 2, theirs, str(tmp_path / "trained"), stage, False)
    from_deepspeed(tmp_path / "trained", theirs, tmp_path / "ours")
    assert find(tmp_path / "ours").reader().read_full("norm.weight", "exp_avg_sq").count_nonzero() > 16
    assert to_deepspeed(tmp_path / "ours", tmp_path / "universal").passed
    assert to_deepspeed(tmp_path / "ours", tmp_path / "zero", ranks=2).passed
    for name, target, universal in [("universal", stage, True), ("zero", 2, False)]:
        again = tmp_path / f"{name}-again"
        assert run(load_and_save, 2, theirs, str(tmp_path / name), str(again), target, universal) == [0.0, 0.0]
        from_deepspeed(again, theirs, tmp_path / f"{name}-ours", check=False)
        assert_same_tensors(tmp_path / f"{name}-ours", tmp_path / "ours")
        from_deepspeed(tmp_path / name, tmp_path / name, tmp_path / f"{name}-read", check=False)
        assert_same_tensors(tmp_path / f"{name}-read", tmp_path / "ours")


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_universal_checkpoint_made_by_deepspeed_is_read(stage, tmp_path, monkeypatch):
    make(tmp_path / "theirs", "llama", SMALL | {"num_hidden_layers": 1, "tie_word_embeddings": stage == 2})
    run(train_and_save, 2, str(tmp_path / "theirs"), str(tmp_path / "trained"), stage, False)
    run(make_universal, 1, str(tmp_path / "trained" / "global_step2"), str(tmp_path / "universal" / "global_step2"))
    from_deepspeed(tmp_path / "trained", tmp_path / "theirs", tmp_path / "ours", check=False)
    assert from_deepspeed(tmp_path / "universal", tmp_path / "theirs", tmp_path / "read").passed
    assert_same_tensors(tmp_path / "read", tmp_path / "ours")


def make_universal(source: str, out: str) -> None:
    """As deepspeed/checkpoint/ds_to_universal.py does it, in this process."""
    from deepspeed.checkpoint import ds_to_universal

    ds_to_universal.main(
        argparse.Namespace(
            input_folder=source, output_folder=out, num_extract_workers=1, num_merge_workers=1,
            keep_temp_folder=False, strict=True, inject_missing_state=True,
        )
    )  # fmt: skip


ODD = [
    None, 5, [], {}, {"module": 3}, {"module": {"a": None}, "param_shapes": 4}, {"optimizer_state_dict": 3},
    {"optimizer_state_dict": []}, {"optimizer_state_dict": {"zero_stage": 2, "partition_count": None}},
    {"optimizer_state_dict": {"zero_stage": 3, "partition_count": 2, "fp32_flat_groups": ["a"]}},
    {"param": "x"}, torch.ones(3),
]  # fmt: skip
"""Sound pickles that hold something else than belongs there."""


def with_moments(folder: Path) -> None:
    """`folder`/theirs as a checkpoint `folder`/trained that has moments: its weights once more."""
    from_hugging_face(folder / "theirs", folder / "converted", check=False)
    commit = find(folder / "converted")
    held = [("weights", name, commit.reader().read_full(name)) for name in commit.reader().names()]
    held += [(state, name, x) for state in ("exp_avg", "exp_avg_sq") for _, name, x in held]
    write_checkpoint(folder / "trained", held, step=1, state=None, facts=commit.manifest.facts)


@pytest.mark.parametrize("ranks", [None, 2], ids=["universal", "zero"])
def test_a_file_that_holds_another_object_is_refused_in_words(ranks, tmp_path):
    make(tmp_path / "theirs", "llama", SMALL | {"num_hidden_layers": 1})
    with_moments(tmp_path)
    to_deepspeed(tmp_path / "trained", tmp_path / "out", ranks=ranks, check=False)
    files = sorted((tmp_path / "out").glob("*/zero/model.norm.weight/*.pt" if ranks is None else "*/*_states.pt"))
    files = [path for path in files if path.name != "step.pt"]  # which is not read
    assert len(files) == 3
    for path in files:
        sound = path.read_bytes()
        for n, odd in enumerate(ODD):
            torch.save(odd, path)
            with pytest.raises(CheckpointError):
                from_deepspeed(tmp_path / "out", tmp_path / "theirs", tmp_path / f"{path.stem}-{n}", check=False)
        path.write_bytes(sound)
    from_deepspeed(tmp_path / "out", tmp_path / "theirs", tmp_path / "again", check=False)


def test_a_checkpoint_without_moments_is_not_written_for_deepspeed(tmp_path):
    make(tmp_path / "theirs", "llama", SMALL)
    from_hugging_face(tmp_path / "theirs", tmp_path / "ours", check=False)
    with pytest.raises(CheckpointError, match="does not hold exp_avg and exp_avg_sq of every weight"):
        to_deepspeed(tmp_path / "ours", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["global_step1", "."], ids=["in the step's folder", "above it"])
def test_the_config_beside_a_checkpoint_must_be_that_of_like(place, tmp_path):
    """The same tensors under another config are another model, which would be proven against itself."""
    make(tmp_path / "theirs", "llama", SMALL | GROUPED)
    with_moments(tmp_path)
    to_deepspeed(tmp_path / "trained", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").rename(tmp_path / "out" / place / "config.json")
    theta = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 1e-3}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config | theta))
    with pytest.raises(CheckpointError, match=r"are of different models \(norm\.eps .*, position\.theta .*500"):
        from_deepspeed(tmp_path / "out", tmp_path / "theirs", tmp_path / "ours")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    assert from_deepspeed(tmp_path / "out", tmp_path / "theirs", tmp_path / "ours").passed


def test_files_of_more_ranks_than_may_be_open_at_once_are_written_and_read(tmp_path):
    make(tmp_path / "theirs", "llama", SMALL | {"num_hidden_layers": 1})
    with_moments(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, limits[1]))
    try:
        assert to_deepspeed(tmp_path / "trained", tmp_path / "out", ranks=100).passed
        assert from_deepspeed(tmp_path / "out", tmp_path / "out", tmp_path / "ours").passed
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert_same_tensors(tmp_path / "ours", tmp_path / "trained")


# ------------------------------------------------------------------------------------------------ pickles


def test_tensors_of_all_dtypes_and_views_come_out_as_they_went_in(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    saved = {
        "view": base.T[1:3], "base": base, "empty": torch.empty(0, 3), "list": [torch.ones(2), (torch.zeros(1), 5)],
        "parameter": torch.nn.Parameter(torch.ones(3)), "shape": torch.Size([2, 3]), "dtype": torch.bfloat16,
        **{str(d): torch.ones(3).to(d) for d in (torch.bfloat16, torch.float16, torch.float64, torch.int64)},
    }  # fmt: skip
    torch.save(saved, tmp_path / "x.pt")
    found = load_pickled(tmp_path / "x.pt")
    assert found["shape"] == (2, 3)
    assert found["dtype"] == torch.bfloat16
    for name, x in saved.items():
        if isinstance(x, torch.Tensor):
            assert found[name].dtype == x.dtype
            assert torch.equal(found[name], x)
    assert torch.equal(found["list"][1][0], torch.zeros(1))
    assert found["list"][1][1] == 5


class Payload:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def archive(path: Path, text: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", text)
    return path


def test_a_payload_in_a_pickle_is_refused_by_name_and_not_called(tmp_path):
    canary = tmp_path / "canary"
    payloads = [
        Payload(os.system, f"touch {canary}"),
        Payload(exec, f"open({str(canary)!r}, 'w')"),
        Payload(eval, f"open({str(canary)!r}, 'w')"),
        Payload(open, str(canary), "w"),
        Payload(Path.touch, canary),
        Payload(getattr, "text", "format"),
        Payload(__import__, "antigravity"),
    ]
    for protocol in range(2, 6):
        for payload in payloads:
            path = archive(tmp_path / "x.pt", pickle.dumps({"module": payload}, protocol))
            with pytest.raises(
                CheckpointError, match=r"asks for .*, which tensors do not need and which is not called"
            ):
                load_pickled(path)
    torch.save({"module": payloads[0]}, tmp_path / "y.pt")
    with pytest.raises(CheckpointError, match="is not called"):
        load_pickled(tmp_path / "y.pt")
    assert not canary.exists()


def test_names_of_expected_packages_are_placeholders_and_nothing_of_theirs_runs(tmp_path):
    text = b"cdeepspeed.launcher.runner\nmain\n(S'--help'\ntR."  # a call of a function that would end the process
    found = load_pickled(archive(tmp_path / "x.pt", text))
    assert type(found).__name__ == "Placeholder"


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\x80\x02",
        b"garbage",
        b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01BINGET",
        b"(" * 100_000,
        b"\x80\x04\x95" + b"\xff" * 8,
        b"\x80\x04\x8e" + (2**60).to_bytes(8, "little"),  # so many bytes follow
        b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"x",  # a text as long
        b"\x80\x02\x8b\xff\xff\xff\x7f",  # a number of 2 GiB
        b"\x80\x02" + b"]" * 10 + b"r\xff\xff\xff\x7f.",  # the memo's last place
    ],
)
def test_damaged_pickles_are_refused_in_words(text, tmp_path):
    with pytest.raises(CheckpointError):
        load_pickled(archive(tmp_path / "x.pt", text))


def test_storages_that_lie_are_refused(tmp_path):
    torch.save({"a": torch.arange(6.0)}, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "x.pt") as file:
        (described,) = (name for name in file.namelist() if name.endswith("data.pkl"))
        text = file.read(described)
    for change in (text.replace(b"K\x06", b"K\x07"), text.replace(b"FloatStorage", b"LongStorage")):
        assert change != text
        with zipfile.ZipFile(tmp_path / "y.pt", "w") as file:
            file.writestr("x/data.pkl", change)
            file.writestr("x/data/0", torch.arange(6.0).numpy().tobytes())
        with pytest.raises(CheckpointError, match="damaged"):
            load_pickled(tmp_path / "y.pt")
    for size, stride, offset in [((7,), (1,), 0), ((2, 3), (9, 1), 0), ((2,), (1,), 5), ((2,), (-1,), 1)]:
        storage = torch.arange(6.0)._typed_storage()
        lie = Payload(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())
        torch.save({"a": lie}, tmp_path / "y.pt")
        with pytest.raises(CheckpointError, match="damaged: a tensor lies beyond its storage"):
            load_pickled(tmp_path / "y.pt")
    (tmp_path / "z.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_pickled(tmp_path / "z.pt")
