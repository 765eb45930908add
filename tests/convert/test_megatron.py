"""Megatron-LM's checkpoints, built by its documented layout; the index of torch_dist is written by torch itself."""

import argparse
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from megatrain.base.errors import CheckpointError, FailedCheckpointError
from megatrain.checkpoint.read import find
from megatrain.convert.megatron import from_megatron
from megatrain.convert.torch_dist import DistFolder
from megatrain.data.tokenizer import train_tokenizer
from tests.convert.test_deepspeed import Payload
from tests.ranks import run

SIZES = {
    "num_layers": 4, "hidden_size": 16, "num_attention_heads": 4, "kv_channels": 4, "ffn_hidden_size": 24,
    "padded_vocab_size": 40, "seq_length": 32, "max_position_embeddings": 32, "norm_epsilon": 1e-5,
}  # fmt: skip
LLAMA = SIZES | {
    "group_query_attention": True, "num_query_groups": 2, "normalization": "RMSNorm", "swiglu": True,
    "position_embedding_type": "rope", "rotary_base": 500, "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
}  # fmt: skip
GPT = SIZES | {
    "group_query_attention": False, "normalization": "LayerNorm", "swiglu": False, "bias_gelu_fusion": True,
    "position_embedding_type": "learned_absolute", "add_bias_linear": True,
}  # fmt: skip
QWEN = LLAMA | {"add_qkv_bias": True, "qk_layernorm": True, "rotary_percent": 0.5, "apply_layernorm_1p": True}


def full_tensors(a: dict) -> dict[str, torch.Tensor]:
    """Random tensors under Megatron-Core's names."""
    d, ff, v = a["hidden_size"], a["ffn_hidden_size"], a["padded_vocab_size"]
    groups = a["num_query_groups"] if a["group_query_attention"] else a["num_attention_heads"]
    qkv = (a["num_attention_heads"] + 2 * groups) * a["kv_channels"]
    shapes = {"embedding.word_embeddings.weight": (v, d), "decoder.final_layernorm.weight": (d,)}
    if a["position_embedding_type"] == "learned_absolute":
        shapes["embedding.position_embeddings.weight"] = (a["max_position_embeddings"], d)
    if a.get("untie_embeddings_and_output_weights"):
        shapes["output_layer.weight"] = (v, d)
    for i in range(a["num_layers"]):
        at = f"decoder.layers.{i}"
        shapes |= {
            f"{at}.self_attention.linear_qkv.weight": (qkv, d),
            f"{at}.self_attention.linear_qkv.layer_norm_weight": (d,),
            f"{at}.self_attention.linear_proj.weight": (d, a["num_attention_heads"] * a["kv_channels"]),
            f"{at}.mlp.linear_fc1.weight": ((2 if a["swiglu"] else 1) * ff, d),
            f"{at}.mlp.linear_fc1.layer_norm_weight": (d,),
            f"{at}.mlp.linear_fc2.weight": (d, ff),
        }
        if a.get("qk_layernorm"):
            shapes |= {f"{at}.self_attention.{x}_layernorm.weight": (a["kv_channels"],) for x in "qk"}
        if a["add_bias_linear"] or a.get("add_qkv_bias"):
            shapes[f"{at}.self_attention.linear_qkv.bias"] = (qkv,)
        if a["add_bias_linear"]:
            shapes |= {
                f"{at}.self_attention.linear_proj.bias": (d,), f"{at}.mlp.linear_fc2.bias": (d,),
                f"{at}.mlp.linear_fc1.bias": ((2 if a["swiglu"] else 1) * ff,),
            }  # fmt: skip
    if a["normalization"] == "LayerNorm":
        norms = [name for name in shapes if name.endswith(("layer_norm_weight", "layernorm.weight"))]
        shapes |= {name.removesuffix("weight") + "bias": (d,) for name in norms}
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=g) * 0.3 for name, shape in shapes.items()}


def part(name: str, x: torch.Tensor, rank: int, size: int, gated: bool) -> torch.Tensor:
    """What a tensor-parallel rank holds: groups of heads, outputs (of gate and rest each), or inputs."""
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return x.chunk(size, 1)[rank].clone()
    if "linear_fc1." in name and "norm" not in name and gated:
        return torch.cat([half.chunk(size)[rank] for half in x.chunk(2)])
    cut = ("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "linear_fc1.bias", "embeddings.weight")
    if (name.endswith(cut) and "position" not in name) or name == "output_layer.weight":
        return x.chunk(size)[rank].clone()
    return x


def write_ranks(folder: Path, a: dict, tp: int, pp: int, chunks: int = 1, spell=lambda name: name) -> Path:
    """mp_rank_TT[_PPP]/model_optim_rng.pt; a stage holds `chunks` spans of layers, each numbered from 0."""
    full, out = full_tensors(a), folder / "iter_0000007"
    each = a["num_layers"] // (pp * chunks)
    for t in range(tp):
        for p in range(pp):
            models = []
            for c in range(chunks):
                first, held = (c * pp + p) * each, {}
                for name, x in full.items():
                    mine = part(name, x, t, tp, a["swiglu"])
                    if name.startswith("decoder.layers."):
                        layer, rest = name.removeprefix("decoder.layers.").split(".", 1)
                        if first <= int(layer) < first + each:
                            held[spell(f"decoder.layers.{int(layer) - first}.{rest}")] = mine
                    elif name.startswith("embedding."):
                        if p == 0 and c == 0:
                            held[spell(name)] = mine
                    elif p == pp - 1 and c == chunks - 1:
                        held[spell(name)] = mine
                if not a.get("untie_embeddings_and_output_weights") and pp > 1 and p == pp - 1 and c == chunks - 1:
                    held["output_layer.weight"] = part("output_layer.weight", full[EMBEDDING], t, tp, False)
                held["decoder.layers.0.self_attention.linear_qkv._extra_state"] = None
                models.append(held)
            name = f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "")
            (out / name).mkdir(parents=True)
            named = {"model": models[0]} if chunks == 1 else {f"model{c}": m for c, m in enumerate(models)}
            rest = {"args": argparse.Namespace(**a), "iteration": 7, "checkpoint_version": 3.0, "optimizer": None}
            torch.save(named | rest, out / name / "model_optim_rng.pt")
    return folder


EMBEDDING = "embedding.word_embeddings.weight"


def of_2021(name: str) -> str:
    """The names of Megatron-LM before Megatron-Core."""
    for new, old in [
        ("embedding.", "language_model.embedding."), ("output_layer", "language_model.output_layer"),
        ("decoder.", "language_model.encoder."), ("linear_qkv.layer_norm_", "layernorm_in."),
        ("linear_fc1.layer_norm_", "layernorm_out."), ("linear_qkv", "query_key_value"), ("linear_proj", "dense"),
        ("linear_fc1", "dense_h_to_4h"), ("linear_fc2", "dense_4h_to_h"),
        ("self_attention.layernorm_in", "input_layernorm"), ("mlp.layernorm_out", "post_attention_layernorm"),
    ]:  # fmt: skip
        name = name.replace(new, old)
    return name


def write_dist(folder: str, a: dict) -> None:
    """Megatron's torch_dist: layers stacked, ranks write chunks; every rank calls it."""
    full, stacked = full_tensors(a), {}
    for name, x in full.items():
        if name.startswith("decoder.layers."):
            rest = name.removeprefix("decoder.layers.").split(".", 1)[1]
            stacked.setdefault(f"decoder.layers.{rest}", []).append(x)
        else:
            stacked[name] = x
    state = {name: torch.stack(x) if isinstance(x, list) else x for name, x in stacked.items()}
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        dim = {name: 1 if name.startswith("decoder.layers.") else 0 for name in state}
        state = {name: distribute_tensor(x, mesh, [Shard(dim[name])]) for name, x in state.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that one process saves
        dcp.save(state | {"optimizer.state": torch.ones(3), "bytes": {"x": 1}}, checkpoint_id=folder)
    torch.save({"args": argparse.Namespace(**a), "iteration": 7}, Path(folder) / "common.pt")


def assert_same(a: Path, b: Path) -> None:
    ours, expected = find(a).reader(), find(b).reader()
    assert ours.shapes() == expected.shapes()
    assert all(torch.equal(ours.read_full(name), expected.read_full(name)) for name in ours.names())


@pytest.mark.parametrize("arguments", [LLAMA, GPT, QWEN], ids=["llama", "gpt", "qwen"])
def test_files_of_any_ranks_and_torch_dist_make_the_same_model(arguments, tmp_path):
    """The logits are those of a plain forward pass over each rank's own tensors."""
    report = from_megatron(write_ranks(tmp_path / "one", arguments, 1, 1), tmp_path / "ours")
    assert report.passed
    assert report.largest_logit > 0.5
    for name, options in {"2x1": (2, 1), "2x2": (2, 2), "1x2 in two chunks": (1, 2, 2)}.items():
        assert from_megatron(write_ranks(tmp_path / name, arguments, *options), tmp_path / f"{name} ours").passed
        assert_same(tmp_path / f"{name} ours", tmp_path / "ours")
    write_dist(str(tmp_path / "dist"), arguments)
    assert from_megatron(tmp_path / "dist", tmp_path / "dist ours").passed
    assert_same(tmp_path / "dist ours", tmp_path / "ours")


def test_chunks_that_several_ranks_wrote_are_put_together(tmp_path):
    run(write_dist, 2, str(tmp_path / "dist"), LLAMA)
    assert len(list((tmp_path / "dist").glob("*.distcp"))) == 2
    from_megatron(tmp_path / "dist", tmp_path / "ours", check=False)
    from_megatron(write_ranks(tmp_path / "one", LLAMA, 1, 1), tmp_path / "expected", check=False)
    assert_same(tmp_path / "ours", tmp_path / "expected")
    folder, full = DistFolder(tmp_path / "dist"), full_tensors(LLAMA)
    name = "self_attention.linear_qkv.weight"
    assert len(folder.tensors[f"decoder.layers.{name}"].chunks) == 2
    assert torch.equal(folder.read(f"decoder.layers.{name}", 2), full[f"decoder.layers.2.{name}"])


def test_names_of_before_megatron_core_are_known(tmp_path):
    from_megatron(write_ranks(tmp_path / "old", GPT, 2, 1, spell=of_2021), tmp_path / "ours")
    from_megatron(write_ranks(tmp_path / "new", GPT, 1, 1), tmp_path / "expected")
    assert_same(tmp_path / "ours", tmp_path / "expected")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts": 8}, r"it has experts \(num_experts=8\)"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type is 'alibi'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"qk_layernorm": True}, "layers.0.self_attention.q_layernorm.weight is missing"),
        ({"untie_embeddings_and_output_weights": False}, "output_layer.weight of .* differs from embedding"),
    ],
)
def test_what_our_model_cannot_be_is_refused(changes, words, tmp_path):
    folder = write_ranks(tmp_path / "theirs", LLAMA, 1, 1)
    file = folder / "iter_0000007" / "mp_rank_00" / "model_optim_rng.pt"
    held = torch.load(file, weights_only=False)
    held["args"] = argparse.Namespace(**(LLAMA | changes))
    torch.save(held, file)
    with pytest.raises(CheckpointError, match=words):
        from_megatron(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_tokenizer_of_more_tokens_than_rows_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(train_tokenizer(["a text of its own"], 280))
    folder = write_ranks(tmp_path / "theirs", LLAMA, 1, 1)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has 2\d\d tokens and the embedding \d+ rows"):
        from_megatron(folder, tmp_path / "ours", tokenizer=tmp_path / "tokenizer.json")
    assert not (tmp_path / "ours").exists()


def test_ranks_that_are_missing_or_disagree_are_refused(tmp_path):
    folder = write_ranks(tmp_path / "theirs", LLAMA, 2, 2)
    file = folder / "iter_0000007" / "mp_rank_01_001" / "model_optim_rng.pt"
    held = torch.load(file, weights_only=False)
    held["model"]["decoder.final_layernorm.weight"] += 1
    torch.save(held, file)
    with pytest.raises(CheckpointError, match=r"final_layernorm.weight differs between ranks"):
        from_megatron(folder, tmp_path / "ours", check=False)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"lacks the file of tensor-parallel rank and stage \(1, 1\)"):
        from_megatron(folder, tmp_path / "ours")
    with pytest.raises(CheckpointError, match="holds no checkpoint of Megatron-LM"):
        from_megatron(tmp_path, tmp_path / "ours")


def test_payloads_in_every_pickled_file_are_refused_and_not_called(tmp_path):
    canary = tmp_path / "canary"
    write_dist(str(tmp_path / "dist"), LLAMA)
    ranks = write_ranks(tmp_path / "ranks", LLAMA, 1, 1) / "iter_0000007" / "mp_rank_00" / "model_optim_rng.pt"
    shard = next((tmp_path / "dist").glob("*.distcp"))
    for payload in (Payload(os.system, f"touch {canary}"), Payload(exec, f"open({str(canary)!r}, 'w')"),
                    Payload(Path.touch, canary)):  # fmt: skip
        spoiled = {
            tmp_path / "dist" / ".metadata": pickle.dumps(payload),
            tmp_path / "dist" / "common.pt": payload,
            ranks: {"args": payload, "model": {}},
        }
        for file, content in spoiled.items():
            whole = file.read_bytes()
            file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
            with pytest.raises(
                CheckpointError, match=r"asks for .*, which tensors do not need and which is not called"
            ):
                from_megatron(file.parent if file != ranks else file.parents[1], tmp_path / "ours")
            file.write_bytes(whole)
        (chunk,) = DistFolder(tmp_path / "dist").tensors[EMBEDDING].chunks
        torch.save(payload, tmp_path / "x.pt")
        with zipfile.ZipFile(tmp_path / "x.pt", "a") as archive:  # filled up to the chunk's length
            archive.comment = b" " * (chunk.end - chunk.begin - (tmp_path / "x.pt").stat().st_size)
        whole = shard.read_bytes()
        shard.write_bytes(whole[: chunk.begin] + (tmp_path / "x.pt").read_bytes() + whole[chunk.end :])
        with pytest.raises(CheckpointError, match="which is not called"):
            from_megatron(tmp_path / "dist", tmp_path / "ours")
        shard.write_bytes(whole)
    assert not canary.exists()
    from_megatron(tmp_path / "dist", tmp_path / "ours", check=False)


def test_damaged_files_of_torch_dist_are_named(tmp_path):
    write_dist(str(tmp_path / "dist"), LLAMA)
    shard, index = next((tmp_path / "dist").glob("*.distcp")), tmp_path / "dist" / ".metadata"
    whole, told = shard.read_bytes(), index.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FailedCheckpointError, match="distcp"):
        from_megatron(tmp_path / "dist", tmp_path / "ours")
    shard.write_bytes(whole)
    for text in (told[: len(told) // 2], b"", b"\x80\x04N.", told.replace(b"chunks", b"chumps")):
        index.write_bytes(text)
        with pytest.raises(CheckpointError):
            from_megatron(tmp_path / "dist", tmp_path / "ours")
    index.write_bytes(told.replace(shard.name.encode(), b"../x/y.distcp"[: len(shard.name)]))
    with pytest.raises(CheckpointError, match="no file of this folder"):
        from_megatron(tmp_path / "dist", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
