"""DeepSpeed's checkpoints, written by DeepSpeed itself, read without executing anything in them."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers

from megatrain.base.errors import CheckpointError
from megatrain.checkpoint.read import find
from megatrain.convert.deepspeed_zero import DeepSpeedFolder
from megatrain.convert.hugging_face import from_deepspeed, from_hugging_face
from megatrain.convert.pickled import load_pickled
from tests.convert.test_hugging_face import GROUPED, SMALL, make
from tests.ranks import run


def train_and_save(theirs: str, out: str, stage: int, frozen: bool) -> None:
    """Two parameter groups, two steps, DeepSpeed's own save; rank 0 also leaves what transformers would save."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = transformers.AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32)
    if frozen:
        model.model.layers[0].mlp.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() == 1]}, {"params": [p for p in trained if p.dim() > 1]}]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(groups, lr=1e-2),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "torch_adam": True,
        },
        dist_init_required=False,
    )
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
    (tmp_path / "z.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_pickled(tmp_path / "z.pt")
