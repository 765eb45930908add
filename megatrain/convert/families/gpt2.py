"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, biases everywhere; its matrices are [in, out]."""

from dataclasses import dataclass
from typing import Any, ClassVar

from megatrain.convert.families import FAMILY
from megatrain.convert.table import Row, Theirs

LAYER = "transformer.h.{i}"
OURS = "layers.{i}"

PARTS = {
    "attention_norm": ("ln_1", False),
    "attention.to_qkv": ("attn.c_attn", True),
    "attention.to_out": ("attn.c_proj", True),
    "feed_forward_norm": ("ln_2", False),
    "feed_forward.up": ("mlp.c_fc", True),
    "feed_forward.down": ("mlp.c_proj", True),
}

ACTIVATIONS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}


@FAMILY.register("gpt2")
@dataclass(frozen=True)
class GPT2:
    architecture: ClassVar[str] = "GPT2LMHeadModel"
    untied: ClassVar[str] = "lm_head.weight"
    prefix: ClassVar[str] = "transformer."
    left_out: ClassVar[tuple[str, ...]] = ("*.attn.bias", "*.attn.masked_bias")

    def rows(self, model: Any) -> list[Row]:
        return [
            Row.of("embedding.weight", "transformer.wte.weight"),
            Row.of("positions.weight", "transformer.wpe.weight"),
            *(Row.of(f"norm.{kind}", f"transformer.ln_f.{kind}") for kind in ("weight", "bias")),
            *(
                Row.of(f"{OURS}.{ours}.{kind}", f"{LAYER}.{theirs}.{kind}", transposed=transposed)
                for ours, (theirs, transposed) in PARTS.items()
                for kind in ("weight", "bias")
            ),
        ]

    def model(self, theirs: Theirs) -> dict[str, Any]:
        d_model = theirs.need("n_embd")
        activation = theirs.must("activation_function", list(ACTIVATIONS), "our feed-forward has GELU")
        theirs.must("scale_attn_weights", [True], "our scores are scaled")
        theirs.must("scale_attn_by_inverse_layer_idx", [False], "our scores are scaled alike in all layers")
        theirs.need("n_positions")
        return {
            "kind": "decoder",
            "vocab_size": theirs.need("vocab_size"),
            "d_model": d_model,
            "n_layers": theirs.need("n_layer"),
            "n_heads": theirs.need("n_head"),
            "d_ff": theirs.get("n_inner", 4 * (d_model or 0)),
            "tie_embeddings": theirs.get("tie_word_embeddings", True),
            "norm": {"kind": "layer_norm", "eps": theirs.get("layer_norm_epsilon", 1e-5)},
            "position": {"kind": "learned"},
            "attention": {"kind": "causal", "bias": True},
            "feed_forward": {"kind": "gelu", "bias": True, "approximate": ACTIVATIONS.get(activation, "none")},
        }

    def unsupported_reasons(self, model: Any) -> list[str]:
        found = layer_norm_reasons(model)
        if model.position.kind != "learned":
            found.append(f"position is {model.position.kind}, theirs is learned")
        return found

    def config(self, model: Any) -> dict[str, Any]:
        tanh = getattr(model.feed_forward, "approximate", "none") == "tanh"
        return {
            "n_embd": model.d_model,
            "n_layer": model.n_layers,
            "n_head": model.n_heads,
            "n_inner": model.d_ff,
            "activation_function": "gelu_new" if tanh else "gelu",
            "layer_norm_epsilon": model.norm.eps,
            "initializer_range": model.init_std,
        }


def layer_norm_reasons(model: Any, placements: tuple[str, ...] = ("pre",)) -> list[str]:
    """What GPT-2 and GPT-NeoX have in common: LayerNorm, GELU, biases, a head for every query."""
    found = plain_embedding_reasons(model)
    if model.norm.kind != "layer_norm" or not model.norm.bias or model.norm.placement not in placements:
        found.append("norm is not LayerNorm with a bias before each sublayer, as theirs is")
    if model.feed_forward.kind != "gelu" or not model.feed_forward.bias:
        found.append("feed_forward is not GELU with biases, as theirs is")
    if model.attention.kind != "causal" or not model.attention.bias or model.attention.qk_norm:
        found.append("attention is not causal with biases and without norms, as theirs is")
    if model.kv_heads != model.n_heads or model.width_of_head * model.n_heads != model.d_model:
        found.append("n_kv_heads or head_dim are not those of n_heads that divide d_model, as theirs are")
    return found


def plain_embedding_reasons(model: Any) -> list[str]:
    return ["embedded tokens are scaled, theirs are not"] if model.scale_embeddings else []
