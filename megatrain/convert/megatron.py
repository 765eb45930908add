"""Decoders that Megatron-LM trained, to checkpoints of ours."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from megatrain.base.errors import CheckpointError
from megatrain.checkpoint.manifest import digest_of
from megatrain.checkpoint.model import model_choice, shapes_of
from megatrain.checkpoint.storage import new_place
from megatrain.checkpoint.stream import write_checkpoint
from megatrain.convert.check import Proof, Report
from megatrain.convert.hugging_face import ours
from megatrain.convert.megatron_files import MegatronFiles, open_megatron
from megatrain.convert.megatron_reference import Reference, groups_of
from megatrain.convert.publish import made_beside, published
from megatrain.convert.table import Row, expanded
from megatrain.data.manifest import TOKENIZER
from megatrain.data.tokenizer import Tokenizer
from megatrain.nn.position.rotary import Rotary

LAYER, OURS = "decoder.layers.{i}", "layers.{i}"

PARTS = {
    "attention_norm": "self_attention.linear_qkv.layer_norm_",
    "attention.to_out": "self_attention.linear_proj.",
    "feed_forward_norm": "mlp.linear_fc1.layer_norm_",
    "feed_forward.down": "mlp.linear_fc2.",
    "attention.q_norm": "self_attention.q_layernorm.",
    "attention.k_norm": "self_attention.k_layernorm.",
}

UNKNOWN = {
    "num_experts": "experts",
    "multi_latent_attention": "latent attention",
    "rotary_interleaved": "rotary positions that pair neighbours",
    "squared_relu": "a squared ReLU",
    "fp8_param": "weights kept in 8 bits",
    "window_size": "windows of attention",
    "mtp_num_layers": "layers that predict further tokens",
    "heterogeneous_layers_config_path": "layers of different kinds",
}
"""Arguments that make a model which ours is not, with what they stand for."""


def rows(model: Any) -> list[Row]:
    """Our tensors, and theirs under the names of Megatron-Core."""
    fc1 = "feed_forward.gate_up" if model.feed_forward.kind == "swiglu" else "feed_forward.up"
    found = [
        Row.of("embedding.weight", "embedding.word_embeddings.weight"),
        Row.of("positions.weight", "embedding.position_embeddings.weight"),
        Row.of("head.weight", "output_layer.weight"),
    ]
    for kind in ("weight", "bias"):
        found.append(Row.of(f"norm.{kind}", f"decoder.final_layernorm.{kind}"))
        found.append(
            Row.of(f"{OURS}.attention.to_qkv.{kind}", f"{LAYER}.self_attention.linear_qkv.{kind}", grouped=True)
        )
        found.append(Row.of(f"{OURS}.{fc1}.{kind}", f"{LAYER}.mlp.linear_fc1.{kind}"))
        found += [Row.of(f"{OURS}.{ours}.{kind}", f"{LAYER}.{theirs}{kind}") for ours, theirs in PARTS.items()]
    return list(expanded(found, {"i": model.n_layers}))


def from_megatron(
    folder: str | Path, out: str | Path, *, tokenizer: str | Path | None = None, check: bool = True
) -> Report:
    """Make a checkpoint of weights from one of Megatron-LM: mp_rank_XX/model_optim_rng.pt, or torch_dist.

    Args:
        tokenizer: the tokenizer.json of the model, which Megatron-LM does not keep with it.

    Raises:
        CheckpointError: it cannot be ours, a tensor is missing or left over, a file asks for code to be called (which
            is never done), or the logits differ (what was made is then in `out`.failed).
    """
    out = new_place(out)
    files = open_megatron(folder)
    section, seq_len = section_of(files)
    choice = model_choice(section, str(files.path))
    shapes = shapes_of(choice, section["vocab_size"], seq_len)
    table = [row for row in rows(choice) if row.ours in shapes]
    wanted, held = {name for row in table for name in row.theirs}, set(files.names)
    problems = [f"{name} is missing" for name in sorted(wanted - held)]
    problems += [f"{name} is in no row of the table" for name in sorted(held - wanted)]
    if problems:
        raise CheckpointError("\n".join([f"{files.path} does not hold the tensors of its arguments:", *problems[:20]]))
    theirs, beside, entry = Theirs(files, choice), {}, None
    if tokenizer is not None:
        beside[TOKENIZER] = Path(tokenizer).read_bytes()
        parsed = Tokenizer.parse(beside[TOKENIZER], str(tokenizer), None)
        if parsed.vocab_size > section["vocab_size"]:
            raise CheckpointError(
                f"{tokenizer} has {parsed.vocab_size} tokens and the embedding {section['vocab_size']} rows: give the "
                "tokenizer.json that the model was trained with"
            )
        entry = {"fingerprint": digest_of(beside[TOKENIZER]), "end_of_document": parsed.end_of_document}
    facts = {
        "config": {"model": section, "data": {"seq_len": seq_len, "sources": []}},
        "tokenizer": entry,
        "lineage": [{"step": 0, "converted": str(files.path), "from": "Megatron-LM"}],
    }
    with made_beside(out) as place:
        tensors = ours(theirs, table, choice, shapes)
        written = write_checkpoint(place, tensors, step=0, state=None, facts=facts, beside=beside)
        return published(place, out, check, Proof(written, theirs, "megatron", str(files.path), str(out)))


class Theirs:
    """Megatron's files as the other side of a conversion."""

    moments: tuple[str, ...] = ()

    def __init__(self, files: MegatronFiles, choice: Any):
        self.files, self.path, self.choice = files, files.path, choice

    def read(self, name: str, state: str = "weights") -> Tensor:
        return self.files.read(name)

    def logits(self, tokens: Tensor) -> Tensor:
        position = self.choice.position
        rates = position.rates(self.choice.width_of_head) if isinstance(position, Rotary) else None
        approximate = getattr(self.choice.feed_forward, "approximate", "none")
        return Reference(self.files.ranks(), self.files.arguments, rates, approximate).logits(tokens)


# ------------------------------------------------------------------------------------------------ their arguments


@dataclass
class Arguments:
    """Their command line, read key by key."""

    values: Mapping[str, Any]
    problems: list[str] = field(default_factory=list)

    def need(self, key: str) -> Any:
        if self.values.get(key) is None:
            self.problems.append(f"{key} is missing")
        return self.values.get(key)

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value


def section_of(files: MegatronFiles) -> tuple[dict[str, Any], int]:
    """Our `model` section, and tokens of a sequence.

    Raises:
        CheckpointError: with everything that our model cannot be.
    """
    theirs = Arguments(files.arguments)
    theirs.problems += [f"it has {what} ({key}={theirs.get(key)})" for key, what in UNKNOWN.items() if theirs.get(key)]
    bias, qkv_bias = theirs.get("add_bias_linear", True), theirs.get("add_qkv_bias", False)
    learned = theirs.get("position_embedding_type", "learned_absolute") == "learned_absolute"
    section = {
        "kind": "decoder",
        "vocab_size": theirs.get("padded_vocab_size"),
        "d_model": theirs.need("hidden_size"),
        "n_layers": theirs.need("num_layers"),
        "n_heads": theirs.need("num_attention_heads"),
        "n_kv_heads": groups_of(files.arguments) if theirs.get("num_attention_heads") else None,
        "head_dim": theirs.get("kv_channels"),
        "d_ff": theirs.need("ffn_hidden_size"),
        "tie_embeddings": not theirs.get("untie_embeddings_and_output_weights", False),
        "norm": _norm(theirs),
        "position": {"kind": "learned"} if learned else _position(theirs),
        "attention": {"kind": "causal", "bias": bias or qkv_bias, "qk_norm": theirs.get("qk_layernorm", False)},
        "feed_forward": _feed_forward(theirs, bias),
    }
    seq_len = theirs.get("max_position_embeddings" if learned else "seq_length", theirs.get("seq_length", 2048))
    if theirs.problems:
        raise CheckpointError("\n".join([f"{files.path} cannot be converted:", *theirs.problems]))
    if section["vocab_size"] is None:
        section["vocab_size"] = files.read("embedding.word_embeddings.weight").shape[0]
    return section, seq_len


def _norm(theirs: Arguments) -> dict[str, Any]:
    eps = theirs.get("norm_epsilon", theirs.get("layernorm_epsilon", 1e-5))
    distance_from_1 = theirs.get("apply_layernorm_1p", False)
    if theirs.get("normalization", "LayerNorm") == "RMSNorm":
        return {"kind": "zero_centred_rms_norm" if distance_from_1 else "rms_norm", "eps": eps}
    if distance_from_1:
        theirs.problems.append("apply_layernorm_1p: our LayerNorm keeps its gain, not the distance from 1")
    return {"kind": "layer_norm", "eps": eps}


def _position(theirs: Arguments) -> dict[str, Any]:
    kind = theirs.get("position_embedding_type")
    if kind == "none":
        return {"kind": "none"}
    if kind != "rope":
        theirs.problems.append(f"position_embedding_type is {kind!r}: ours know rope, learned_absolute and none")
    section = {"theta": float(theirs.get("rotary_base", 10_000))}
    if (share := theirs.get("rotary_percent", 1.0)) != 1:
        section["share"] = share
    if theirs.get("use_rope_scaling", False):  # constants of Llama 3.1, which Megatron-LM has in its code
        factor = float(theirs.get("rope_scaling_factor", 8.0))
        return section | {"kind": "rotary_llama3", "factor": factor, "original_seq_len": 8192}
    if factor := theirs.get("rotary_seq_len_interpolation_factor"):
        return section | {"kind": "rotary_linear", "factor": float(factor)}
    return section | {"kind": "rotary"}


def _feed_forward(theirs: Arguments, bias: bool) -> dict[str, Any]:
    if theirs.get("swiglu", False):
        return {"kind": "swiglu", "bias": bias}
    fused = theirs.get("bias_gelu_fusion", False) and bias  # its fused kernel has the approximation
    tanh = fused or theirs.get("openai_gelu", False)
    return {"kind": "gelu", "bias": bias, "approximate": "tanh" if tanh else "none"}
