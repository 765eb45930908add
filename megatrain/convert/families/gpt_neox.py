"""GPT-NeoX and Pythia (Black et al. 2022, arXiv:2204.06745): attention and feed-forward side by side, rotary positions
on a part of each head, and q, k, v interleaved by head."""

from dataclasses import dataclass
from typing import Any, ClassVar

from megatrain.convert.families import FAMILY
from megatrain.convert.families.gpt2 import layer_norm_reasons
from megatrain.convert.table import Row, Theirs, their_rope
from megatrain.nn.position.rotary import Rotary

LAYER = "gpt_neox.layers.{i}"
OURS = "layers.{i}"

PARTS = {
    "attention_norm": "input_layernorm",
    "attention.to_out": "attention.dense",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.up": "mlp.dense_h_to_4h",
    "feed_forward.down": "mlp.dense_4h_to_h",
}

KINDS = ("weight", "bias")


@FAMILY.register("gpt_neox")
@dataclass(frozen=True)
class GPTNeoX:
    architecture: ClassVar[str] = "GPTNeoXForCausalLM"
    untied: ClassVar[str] = "embed_out.weight"
    prefix: ClassVar[str] = "gpt_neox."
    left_out: ClassVar[tuple[str, ...]] = ("*.attention.bias", "*.attention.masked_bias", "*.rotary_emb.inv_freq")

    def rows(self, model: Any) -> list[Row]:
        qkv = [(f"{OURS}.attention.to_qkv.{k}", f"{LAYER}.attention.query_key_value.{k}") for k in KINDS]
        return [
            Row.of("embedding.weight", "gpt_neox.embed_in.weight"),
            *(Row.of(f"norm.{k}", f"gpt_neox.final_layer_norm.{k}") for k in KINDS),
            *(Row.of(ours, theirs, grouped=True) for ours, theirs in qkv),
            *(Row.of(f"{OURS}.{ours}.{k}", f"{LAYER}.{theirs}.{k}") for ours, theirs in PARTS.items() for k in KINDS),
        ]

    def model(self, theirs: Theirs) -> dict[str, Any]:
        theirs.must("hidden_act", ["gelu"], "our feed-forward has GELU by the error function")
        theirs.must("attention_bias", [True], "our attention has the biases of the feed-forward")
        return {
            "kind": "decoder",
            "vocab_size": theirs.need("vocab_size"),
            "d_model": theirs.need("hidden_size"),
            "n_layers": theirs.need("num_hidden_layers"),
            "n_heads": theirs.need("num_attention_heads"),
            "d_ff": theirs.need("intermediate_size"),
            "tie_embeddings": theirs.get("tie_word_embeddings", False),
            "norm": {
                "kind": "layer_norm",
                "eps": theirs.get("layer_norm_eps", 1e-5),
                "placement": "parallel" if theirs.get("use_parallel_residual", True) else "pre",
            },
            "position": theirs.rope(share=0.25),
            "attention": {"kind": "causal", "bias": True},
            "feed_forward": {"kind": "gelu", "bias": True},
        }

    def unsupported_reasons(self, model: Any) -> list[str]:
        found = layer_norm_reasons(model, ("pre", "parallel"))
        if not isinstance(model.position, Rotary):
            found.append(f"position is {model.position.kind}, theirs is rotary")
        if getattr(model.feed_forward, "approximate", "none") != "none":
            found.append("GELU is approximated, theirs is by the error function")
        return found

    def config(self, model: Any) -> dict[str, Any]:
        rope = their_rope(model.position)
        rope["rope_parameters"] |= {"partial_rotary_factor": model.position.share}  # else a quarter, for them
        return rope | {
            "hidden_size": model.d_model,
            "num_hidden_layers": model.n_layers,
            "num_attention_heads": model.n_heads,
            "intermediate_size": model.d_ff,
            "hidden_act": "gelu",
            "layer_norm_eps": model.norm.eps,
            "rotary_pct": model.position.share,
            "rotary_emb_base": model.position.theta,
            "use_parallel_residual": model.norm.placement == "parallel",
            "attention_bias": True,
            "initializer_range": model.init_std,
        }
