"""A checkpoint becomes the model that was saved, with its tokenizer, or one sentence."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatrain.base.errors import CheckpointError, ConfigError, DataError
from megatrain.checkpoint.manifest import digest_of
from megatrain.config.build import plain
from megatrain.generate.load import load
from megatrain.generate.sample import generate
from megatrain.models.decoder import Decoder
from megatrain.nn.position.learned import Learned
from megatrain.nn.where import KeyValueCache
from tests.generate.toy import SEQ_LEN, SHAPE, loaded, save_run, tokenizer, tokenizer_bytes


@pytest.fixture
def step(tmp_path) -> Path:
    return save_run(tmp_path / "run", loaded())


def rewrite_facts(step: Path, change) -> None:
    """Change what a manifest says, as another program might have written it, and commit that."""
    value = json.loads((step / "manifest.json").read_text())
    change(value["facts"])
    text = json.dumps(value).encode()
    (step / "manifest.json").write_bytes(text)
    (step / "COMMIT").write_text(digest_of(text) + "\n")


@pytest.mark.parametrize(
    "choice",
    [
        Decoder(**SHAPE),
        Decoder(**SHAPE, position=Learned(), tie_embeddings=False, vocab_size=320),
    ],
    ids=["tied", "untied-padded"],
)
def test_the_model_is_the_one_that_was_saved(choice, tmp_path):
    saved = loaded(choice)
    found = load(save_run(tmp_path, saved))
    assert found.model.choice == choice
    assert (found.step, found.seq_len, found.tokenizer.fingerprint) == (3, SEQ_LEN, tokenizer().fingerprint)
    assert not found.model.training
    for (name, ours), (_, theirs) in zip(found.model.named_parameters(), saved.model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert not ours.requires_grad
    assert generate(found, "def ", max_tokens=5) == generate(saved, "def ", max_tokens=5)


def test_a_runs_folder_means_its_newest_checkpoint(tmp_path):
    save_run(tmp_path, loaded(seed=1), step=3)
    save_run(tmp_path, loaded(), step=12)
    assert load(tmp_path).step == load(tmp_path / "checkpoints").step == 12
    assert load(tmp_path / "checkpoints" / "step-00000003").step == 3


def test_a_moved_run_or_checkpoint_is_loaded_where_its_tokenizer_is(step, tmp_path):
    shutil.move(step.parent.parent, tmp_path / "elsewhere")
    assert load(tmp_path / "elsewhere").step == 3
    alone = tmp_path / "alone" / "deep" / "step-00000003"
    shutil.copytree(tmp_path / "elsewhere" / "checkpoints" / step.name, alone)
    with pytest.raises(DataError, match=rf"the tokenizer of {alone} is in none of .*: put the tokenizer.json of"):
        load(alone)
    (alone / "tokenizer.json").write_bytes(tokenizer_bytes())
    assert load(alone).step == 3


def test_a_step_is_found_from_within_its_folder(step, monkeypatch):
    monkeypatch.chdir(step.parent)
    assert load(step.name).step == 3
    monkeypatch.chdir(step)
    assert load(".").step == 3


def test_a_run_in_an_object_store_is_loaded_from_its_url(step):
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    store.put(str(step.parent.parent), "/test_load/run", recursive=True)
    try:
        found = load("memory://test_load/run")
        assert (found.step, found.tokenizer) == (3, tokenizer())
        assert load(f"memory://test_load/run/checkpoints/{step.name}").step == 3
    finally:
        store.rm("/test_load", recursive=True)


def test_an_unusual_end_of_document_is_taken_from_the_facts(step):
    told = {"fingerprint": tokenizer().fingerprint, "end_of_document": 5, "vocab_size": tokenizer().vocab_size}
    rewrite_facts(step, lambda facts: facts.update(tokenizer=told))
    assert load(step).tokenizer.end_of_document == 5


def test_the_tokenizer_of_the_data_serves_where_the_run_has_none(step, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    shutil.move(step.parent.parent / "tokenizer.json", data)
    rewrite_facts(step, lambda facts: facts["config"]["data"].update(sources=[{"path": str(data), "weight": 1.0}]))
    assert load(step).tokenizer == tokenizer()


def test_another_tokenizer_than_the_runs_is_refused(step):
    (step.parent.parent / "tokenizer.json").write_bytes(tokenizer_bytes() + b"\n")
    with pytest.raises(DataError, match=rf"is not the tokenizer that {step} was trained with"):
        load(step)


def test_weights_are_cast_where_asked(step):
    assert {p.dtype for p in load(step, dtype="bf16").model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load(step, device="cpu").model.parameters()} == {torch.float32}
    with pytest.raises(ConfigError, match="dtype=bf61: did you mean bf16"):
        load(step, dtype="bf61")


def test_a_device_that_is_not_there_or_not_known_is_refused(step, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device=cuda and this machine has no card"):
        load(step, device="cuda")
    with pytest.raises(ConfigError, match="device=cpx: did you mean cpu"):
        load(step, device="cpx")


def test_bf16_weights_give_nearly_the_same_logits(step):
    tokens = torch.tensor([tokenizer().encode("def main(")])
    logits = [next_logits(load(step, dtype=dtype), tokens) for dtype in ("fp32", "bf16")]
    assert logits[1].dtype == torch.float32
    assert (logits[1] - logits[0]).abs().max() < 0.1 * logits[0].std()


def next_logits(of, tokens):
    with torch.inference_mode():
        return of.model.decode(tokens, KeyValueCache(tokens.shape[1]))


# ------------------------------------------------------------------------------------------------ errors


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            load(path)


def test_a_damaged_file_is_never_loaded(step):
    (file,) = step.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged"):
        load(step)


def test_a_model_of_an_unknown_kind_is_named_with_the_nearest(step):
    rewrite_facts(step, lambda facts: facts["config"]["model"].update(kind="decodr"))
    with pytest.raises(ConfigError, match=r"model.kind .*step-00000003.* is 'decodr'.*did you mean decoder"):
        load(step)


def test_weights_of_another_shape_or_name_are_all_listed(step):
    config = plain(Decoder(**(SHAPE | {"d_ff": 52, "n_layers": 3})))
    rewrite_facts(step, lambda facts: facts["config"].update(model=config))
    with pytest.raises(CheckpointError, match=r"(?s)not in it: layers.2.*another shape: layers.0.feed_forward"):
        load(step)


@pytest.mark.parametrize(
    "config", [None, {}, {"model": {"kind": "decoder"}}, {"model": "decoder", "data": {"seq_len": 4}}]
)
def test_a_checkpoint_that_does_not_say_its_model_is_refused(step, config):
    rewrite_facts(step, lambda facts: facts.update(config=config))
    with pytest.raises(CheckpointError, match="does not say which model it holds"):
        load(step)


@pytest.mark.parametrize("told", [None, "", {}])
def test_a_checkpoint_that_does_not_say_its_tokenizer_is_refused(step, told):
    rewrite_facts(step, lambda facts: facts.update(tokenizer=told))
    with pytest.raises(DataError, match="does not say which tokenizer"):
        load(step)
