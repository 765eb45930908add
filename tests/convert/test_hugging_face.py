"""Each family there and back with the same bits, and the same logits as transformers computes."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatrain.base.errors import CheckpointError, ConfigError, FailedCheckpointError
from megatrain.checkpoint.read import find
from megatrain.checkpoint.stream import write_checkpoint
from megatrain.convert import hugging_face
from megatrain.convert.families import FAMILY
from megatrain.convert.families.llama import Llama
from megatrain.convert.folder import Folder
from megatrain.convert.hugging_face import from_hugging_face, to_hugging_face
from megatrain.convert.table import Row
from megatrain.data.tokenizer import train_tokenizer

SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 96,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 96}
NEOX = SMALL | {
    "use_parallel_residual": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
}
PYTHIA = SMALL | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25}}

CASES = {
    "llama": ("llama", SMALL),
    "llama grouped and tied": ("llama", SMALL | GROUPED | {"tie_word_embeddings": True}),
    "llama with biases": ("llama", SMALL | GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "llama with wide heads": ("llama", SMALL | GROUPED | {"head_dim": 16}),
    "llama with another base": (
        "llama", SMALL | {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}, "rms_norm_eps": 1e-5},
    ),
    "llama 3.1": ("llama", SMALL | GROUPED | {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 24}}),
    "llama interpolated": (
        "llama", SMALL | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "qwen2 with YaRN": ("qwen2", SMALL | GROUPED | {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "beta_fast": 8.0,
        "original_max_position_embeddings": 24}}),
    "mistral in a window": ("mistral", SMALL | GROUPED | {"sliding_window": 7}),
    "mistral without": ("mistral", SMALL | GROUPED | {"sliding_window": None}),
    "qwen2": ("qwen2", SMALL | GROUPED),
    "qwen2 tied": ("qwen2", SMALL | GROUPED | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", SMALL | GROUPED | {"head_dim": 16}),
    "gpt2": ("gpt2", GPT2),
    "gpt2 with exact GELU": ("gpt2", GPT2 | {"activation_function": "gelu", "n_inner": 40}),
    "gpt_neox one after the other": ("gpt_neox", NEOX),
    "gpt_neox side by side": ("gpt_neox", PYTHIA),
    "gpt_neox interpolated": ("gpt_neox", SMALL | {"rope_parameters": {
        "rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "gemma": ("gemma", SMALL | {"num_key_value_heads": 1, "head_dim": 16}),
    "gemma untied": ("gemma", SMALL | GROUPED | {"head_dim": 8, "tie_word_embeddings": False}),
    "olmo2": ("olmo2", SMALL | GROUPED),
    "olmo2 tied": ("olmo2", SMALL | {"tie_word_embeddings": True, "rms_norm_eps": 1e-6}),
    "olmo2 with YaRN": ("olmo2", SMALL | GROUPED | {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "original_max_position_embeddings": 24}}),
    "gpt_neox tied": ("gpt_neox", NEOX | {"tie_word_embeddings": True}),
}  # fmt: skip


def make(folder, kind: str, options: dict, dtype=torch.float32, shard: str = "5GB") -> torch.nn.Module:
    """A model of theirs with random values everywhere: biases and norms too, which start at 0 and 1."""
    config = transformers.AutoConfig.for_model(kind, **options)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return model


def tensors(folder) -> dict[str, torch.Tensor]:
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_with_the_same_bits_and_logits(case, tmp_path):
    kind, options = CASES[case]
    make(tmp_path / "theirs", kind, options)
    report = from_hugging_face(tmp_path / "theirs", tmp_path / "ours")
    assert report.passed
    assert report.largest_logit > 0.5
    assert report.largest_difference < 1e-5 * max(1, report.largest_logit)
    assert to_hugging_face(tmp_path / "ours", tmp_path / "again").passed
    before, after = tensors(tmp_path / "theirs"), tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    said = json.loads((tmp_path / "again" / "conversion.json").read_text())
    assert (said["family"], said["passed"]) == (kind, True)


def test_every_family_has_a_case():
    assert {kind for kind, _ in CASES.values()} == set(FAMILY.kinds())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_many_files_keep_their_bits(dtype, tmp_path):
    make(tmp_path / "theirs", "llama", SMALL | GROUPED, dtype, shard="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    from_hugging_face(tmp_path / "theirs", tmp_path / "ours")
    to_hugging_face(tmp_path / "ours", tmp_path / "again", shard_bytes=20_000)
    assert len(list((tmp_path / "again").glob("model-*-of-*.safetensors"))) > 2
    before, after = tensors(tmp_path / "theirs"), tensors(tmp_path / "again")
    assert all(x.dtype == after[name].dtype and torch.equal(x, after[name]) for name, x in before.items())
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_a_dtype_that_is_asked_for_rounds_once_and_is_checked(tmp_path):
    make(tmp_path / "theirs", "llama", SMALL)
    from_hugging_face(tmp_path / "theirs", tmp_path / "ours")
    assert to_hugging_face(tmp_path / "ours", tmp_path / "half", dtype="bf16").passed
    before, after = tensors(tmp_path / "theirs"), tensors(tmp_path / "half")
    assert all(torch.equal(x.bfloat16(), after[name]) for name, x in before.items())
    with pytest.raises(ConfigError, match="did you mean bf16"):
        to_hugging_face(tmp_path / "ours", tmp_path / "other", dtype="bf15")


def test_the_model_of_a_file_without_prefix_is_the_same(tmp_path):
    """Bare models (without a head) are published without the first part of each name."""
    make(tmp_path / "theirs", "gpt2", GPT2)
    from_hugging_face(tmp_path / "theirs", tmp_path / "ours")
    held = tensors(tmp_path / "theirs")
    save_file(
        {name.removeprefix("transformer."): x for name, x in held.items()} | {"h.0.attn.bias": torch.zeros(2)},
        tmp_path / "theirs" / "model.safetensors", {"format": "pt"},
    )  # fmt: skip
    from_hugging_face(tmp_path / "theirs", tmp_path / "bare", check=False)
    a, b = find(tmp_path / "ours").reader(), find(tmp_path / "bare").reader()
    assert a.shapes() == b.shapes()
    assert all(torch.equal(a.read_full(name), b.read_full(name)) for name in a.names())


# ------------------------------------------------------------------------------------------------ refusals


REFUSED = {
    "dynamic rotary positions": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0,
                                 "rope_theta": 1e4}}, "rotary positions are scaled by 'dynamic'"),
    "a key of rotary positions": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4,
                                  "original_max_position_embeddings": 8, "mscale": 0.7}}, "have {'mscale': 0.7}"),
    "half of the biases": ("llama", {"attention_bias": True}, "attention_bias and mlp_bias differ"),
    "another activation": ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "a window in some layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
                                "use_sliding_window gives some layers a window"),
    "both directions": ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    "a part of each head": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                            "partial_rotary_factor": 0.25}}, "only 0.25 of each head"),
    "a key that may matter": ("llama", {"logit_softcapping": 30.0}, "logit_softcapping is 30.0, a key that"),
    "an unknown family": ("opt", {}, "config.json is of a 'opt' model: "),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_our_model_cannot_be_is_refused_before_anything_is_written(case, tmp_path):
    kind, options, message = REFUSED[case]
    config = transformers.AutoConfig.for_model(kind, **(SMALL | options))
    (tmp_path / "theirs").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "theirs" / "model.safetensors")
    config.save_pretrained(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=message):
        from_hugging_face(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def spoil(folder, change) -> None:
    held = tensors(folder)
    change(held)
    save_file(held, folder / "model.safetensors", {"format": "pt"})


SPOILED = {
    "a tensor too few": (lambda h: h.pop("model.layers.1.mlp.up_proj.weight"), r"1\.mlp\.up_proj\.weight is missing"),
    "a tensor too many": (lambda h: h.update(extra=torch.zeros(1)), "extra is in no row of the table"),
    "another width": (
        lambda h: h.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(40, 32)}),
        "has 40 rows and its config says 48",
    ),
    "another shape": (lambda h: h.update({"model.norm.weight": torch.zeros(31)}), "do not fit"),
    "a head that is not the embedding": (
        lambda h: h.update({"lm_head.weight": torch.zeros(61, 32)}), "the config says that they are tied",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_files_that_do_not_hold_their_config_are_refused(case, tmp_path):
    change, message = SPOILED[case]
    make(tmp_path / "theirs", "llama", SMALL | {"tie_word_embeddings": True})
    spoil(tmp_path / "theirs", change)
    with pytest.raises(CheckpointError, match=message):
        from_hugging_face(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_table_wrong_by_an_interleave_fails_and_is_moved_away(tmp_path, monkeypatch):
    right = Llama.rows

    def wrong(self, model):
        rows = right(self, model)
        return [
            Row(row.ours, row.theirs[::-1], row.widths[::-1]) if row.ours.endswith("gate_up.weight") else row
            for row in rows
        ]

    make(tmp_path / "theirs", "llama", SMALL)
    monkeypatch.setattr(Llama, "rows", wrong)
    with pytest.raises(CheckpointError, match=r"differ by .*ours.failed, and do not use it"):
        from_hugging_face(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    assert json.loads((tmp_path / "ours.failed" / "conversion.json").read_text())["passed"] is False


def test_pickled_weights_are_refused(tmp_path):
    make(tmp_path / "theirs", "llama", SMALL)
    (tmp_path / "theirs" / "model.safetensors").rename(tmp_path / "theirs" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickled \(pytorch_model.bin\), which can execute code"):
        from_hugging_face(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize(
    "data",
    [
        (2**60).to_bytes(8, "little"),
        (2**22).to_bytes(8, "little") + b"{}",
        (10).to_bytes(8, "little") + b"[" * 10,
        (200_000).to_bytes(8, "little") + b'{"a":' + b"[" * 199_995,
        b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        b"",
    ],
    ids=["2^60", "too long", "nested", "deep", "a pickle", "empty"],
)
def test_header_bombs_and_pickles_in_the_place_of_weights_are_refused(data, tmp_path):
    make(tmp_path / "theirs", "gpt2", GPT2 | {"n_layer": 1})
    (tmp_path / "theirs" / "model.safetensors").write_bytes(data)
    with pytest.raises(FailedCheckpointError, match=r"model\.safetensors"):
        from_hugging_face(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    make(tmp_path / "theirs", "llama", SMALL)
    (tmp_path / "theirs" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "../a.safetensors"}})
    )
    with pytest.raises(CheckpointError, match=r"names '../a.safetensors'"):
        Folder(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ([], "has no weight_map"),
        ({"weight_map": None}, "has no weight_map"),
        ({"weight_map": []}, "has no weight_map"),
        ({"weight_map": {"a": ["x"]}}, r"names \['x'\], which is no safetensors file"),
        ({"weight_map": {"a": 1, "b": "model.safetensors"}}, "names 1, which"),
        ({"weight_map": {"a": "a\0.safetensors"}}, "cannot be read: embedded null byte"),
        ({"weight_map": {"a": "a" * 300 + ".safetensors"}}, "cannot be read: File name too long"),
        ({"weight_map": {"a": "\ud800.safetensors"}}, "cannot be read: .*surrogates"),
        ({"weight_map": {"a": "folder.safetensors"}}, "cannot be read: Is a directory"),
    ],
)
def test_an_index_that_is_none_is_refused(index, words, tmp_path):
    make(tmp_path / "theirs", "llama", SMALL)
    (tmp_path / "theirs" / "model.safetensors").unlink()
    (tmp_path / "theirs" / "folder.safetensors").mkdir()
    (tmp_path / "theirs" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=words):
        Folder(tmp_path / "theirs")


@pytest.mark.parametrize("dtype", [["F32"], {}, None, 1])
def test_a_header_whose_dtype_is_no_text_is_damaged(dtype, tmp_path):
    make(tmp_path / "theirs", "llama", SMALL)
    header = json.dumps({"a": {"dtype": dtype, "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "theirs" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(FailedCheckpointError, match="unknown dtype"):
        Folder(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 10**9}, "speaks of 1000000000 layers, and .* holds .* tensors"),
        ({"max_position_embeddings": -1}, "is for rows of -1 tokens"),
        ({"rope_parameters": "abc"}, "has a value that no llama model has"),
        ({"rope_parameters": {"rope_type": ["x"]}}, "has a value that no llama model has"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "has a value that no llama model has"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
            "rotary positions of kind linear need factor, which is missing",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_parameters says rope_type='default' and rope_scaling 'linear': remove the one",
        ),
        ({"is_causal": False}, "is_causal is False, a key that"),
        ({"logit_softcapping": 0}, "logit_softcapping is 0, a key that"),
        ({"per_layer_windows": []}, r"per_layer_windows is \[\], a key that"),
        ({"vocab_size": -1}, "vocab_size=-1: it must be at least 1"),
        (
            {"vocab_size": float(SMALL["vocab_size"])},
            r"transformers does not take .*what was made is in .*ours\.failed",
        ),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_is_refused(change, words, tmp_path):
    make(tmp_path / "theirs", "llama", SMALL)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises((CheckpointError, ConfigError), match=words):
        from_hugging_face(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_defaults_that_old_files_write_out_are_taken(tmp_path):
    make(tmp_path / "theirs", "llama", SMALL)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    old = {"torchscript": False, "pruned_heads": {}, "output_attentions": False, "bad_words_ids": None, "prefix": None}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config | old))
    assert from_hugging_face(tmp_path / "theirs", tmp_path / "ours").passed


def test_values_that_the_asked_for_dtype_cannot_hold_are_refused(tmp_path):
    """In a row that no prompt of the check may meet."""
    make(tmp_path / "theirs", "llama", SMALL)
    spoil(tmp_path / "theirs", lambda h: h["model.embed_tokens.weight"][60].fill_(1e5))
    from_hugging_face(tmp_path / "theirs", tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"32 values of model\.embed_tokens\.weight are too large for float16"):
        to_hugging_face(tmp_path / "ours", tmp_path / "half", dtype="fp16")
    assert not [p for p in tmp_path.iterdir() if "half" in p.name]
    assert to_hugging_face(tmp_path / "ours", tmp_path / "half", dtype="bf16").passed


def test_two_sets_of_weights_in_one_folder_are_refused(tmp_path):
    make(tmp_path / "theirs", "llama", SMALL, shard="20KB")
    save_file({"model.norm.weight": torch.ones(32)}, tmp_path / "theirs" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has both .*index\.json and model\.safetensors"):
        Folder(tmp_path / "theirs")


def test_an_index_of_other_files_is_refused(tmp_path):
    make(tmp_path / "theirs", "llama", SMALL, shard="20KB")
    path = tmp_path / "theirs" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = next(
        name for name in files if name != index["weight_map"]["model.norm.weight"]
    )
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"says that .* holds model\.norm\.weight, and it does not"):
        Folder(tmp_path / "theirs")


def test_a_tokenizer_of_more_tokens_than_rows_is_refused(tmp_path):
    make(tmp_path / "theirs", "llama", SMALL)
    (tmp_path / "theirs" / "tokenizer.json").write_bytes(train_tokenizer(["a text of its own"], 280))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has 2\d\d tokens and the embedding 61 rows"):
        from_hugging_face(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("files", [("vocab.json", "merges.txt"), ("tokenizer.model",)], ids=["BPE", "SentencePiece"])
def test_a_tokenizer_in_an_older_form_is_left_out_aloud(files, tmp_path, caplog):
    make(tmp_path / "theirs", "llama", SMALL)
    for name in files:
        (tmp_path / "theirs" / name).write_text("x")
    assert from_hugging_face(tmp_path / "theirs", tmp_path / "ours").passed
    assert f"has {' and '.join(files)} and no tokenizer.json, so the model comes without a tokenizer" in caplog.text
    assert find(tmp_path / "ours").manifest.facts["tokenizer"] is None


def test_a_model_of_no_family_is_refused_with_each_ones_reasons(tmp_path):
    make(tmp_path / "theirs", "llama", SMALL)
    from_hugging_face(tmp_path / "theirs", tmp_path / "ours", check=False)
    reader = find(tmp_path / "ours").reader()
    facts = json.loads(json.dumps(reader.facts))
    facts["config"]["model"]["norm"]["placement"] = "post"
    held = [("weights", name, reader.read_full(name)) for name in reader.names()]
    write_checkpoint(tmp_path / "post", held, step=0, state=None, facts=facts)
    with pytest.raises(CheckpointError) as caught:
        to_hugging_face(tmp_path / "post", tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1 + len(FAMILY.kinds())
    with pytest.raises(ConfigError, match="did you mean llama"):
        to_hugging_face(tmp_path / "ours", tmp_path / "out", family="lama")
    with pytest.raises(CheckpointError, match="gpt2: norm is not LayerNorm"):
        to_hugging_face(tmp_path / "ours", tmp_path / "out", family="gpt2")
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_one_row_of_ours_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """The export reads each tensor when it is written, not before."""
    make(tmp_path / "theirs", "llama", SMALL)
    from_hugging_face(tmp_path / "theirs", tmp_path / "ours", check=False)
    order = []
    read, as_bytes = hugging_face.Reader.read_full, hugging_face.bytes_of
    monkeypatch.setattr(hugging_face.Reader, "read_full", lambda *a: order.append("read") or read(*a))
    monkeypatch.setattr(hugging_face, "bytes_of", lambda x: order.append("write") or as_bytes(x))
    to_hugging_face(tmp_path / "ours", tmp_path / "again", check=False)
    runs = "".join(word[0] for word in order).split("r")[1:]
    assert len(runs) == 3 + 3 * 6
    assert {len(writes) for writes in runs} == {1, 2, 3}


PEAK = """
import resource, sys
import torch
from megatrain.convert.hugging_face import from_hugging_face, to_hugging_face
torch.set_num_threads(1)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def peak_of(do):
    open("/proc/self/clear_refs", "w").write("5")  # resets the peak
    before = resident()
    do()
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 - before
theirs, ours, again, warm = sys.argv[1:5]
from_hugging_face(warm, ours + "-warm", check=False)
to_hugging_face(ours + "-warm", again + "-warm", check=False)
print(peak_of(lambda: from_hugging_face(theirs, ours, check=False)))
print(peak_of(lambda: to_hugging_face(ours, again, shard_bytes=int(sys.argv[5]), check=False)))
"""


def test_peak_memory_stays_below_twice_the_largest_file_both_ways(tmp_path):
    """Resident memory, mapped files included, of a model of several files."""
    make(tmp_path / "warm", "llama", SMALL)
    large = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_hidden_layers": 8}
    make(tmp_path / "theirs", "llama", SMALL | large, shard="24MB")
    files = [path.stat().st_size for path in (tmp_path / "theirs").glob("*.safetensors")]
    assert len(files) >= 4
    words = [sys.executable, "-c", PEAK, *(str(tmp_path / name) for name in ("theirs", "ours", "again", "warm"))]
    # As tensors of a real size are, these are given back to the system when they are freed.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([*words, str(max(files))], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    there, back = map(int, done.stdout.split())
    print(f"{sum(files)} bytes in files of at most {max(files)}: peak {there} there, {back} back")
    assert 0 < there < 2 * max(files)
    assert 0 < back < 2 * max(files)
