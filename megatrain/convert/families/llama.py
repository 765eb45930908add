"""Llama (Touvron et al. 2023, arXiv:2302.13971; Grattafiori et al. 2024, arXiv:2407.21783), and its kin."""

from dataclasses import dataclass
from typing import Any, ClassVar

from megatrain.convert.families import FAMILY
from megatrain.convert.families.gpt2 import plain_embedding_reasons
from megatrain.convert.table import Row, Theirs, their_rope
from megatrain.nn.position.rotary import Rotary

LAYER = "model.layers.{i}"
OURS = "layers.{i}"

ROWS = (
    Row.of("embedding.weight", "model.embed_tokens.weight"),
    Row.of("norm.weight", "model.norm.weight"),
    Row.of(f"{OURS}.attention_norm.weight", f"{LAYER}.input_layernorm.weight"),
    Row.of(f"{OURS}.feed_forward_norm.weight", f"{LAYER}.post_attention_layernorm.weight"),
    Row.of(f"{OURS}.attention.to_out.weight", f"{LAYER}.self_attn.o_proj.weight"),
    Row.of(f"{OURS}.feed_forward.down.weight", f"{LAYER}.mlp.down_proj.weight"),
)


def fused(kind: str) -> tuple[Row, Row]:
    """The fused products, their weights or their biases."""
    q, k, v = (f"{LAYER}.self_attn.{x}_proj.{kind}" for x in "qkv")
    gate, up = (f"{LAYER}.mlp.{x}_proj.{kind}" for x in ("gate", "up"))
    return (
        Row.of(f"{OURS}.attention.to_qkv.{kind}", q, k, v, widths=("q", "kv", "kv")),
        Row.of(f"{OURS}.feed_forward.gate_up.{kind}", gate, up, widths=("ff", "ff")),
    )


@FAMILY.register("llama")
@dataclass(frozen=True)
class Llama:
    architecture: ClassVar[str] = "LlamaForCausalLM"
    untied: ClassVar[str] = "lm_head.weight"
    prefix: ClassVar[str] = "model."
    left_out: ClassVar[tuple[str, ...]] = ("*.rotary_emb.inv_freq",)
    """Tensors that old files hold and that are no weights."""

    def rows(self, model: Any) -> list[Row]:
        (qkv, gate_up), (qkv_bias, gate_up_bias) = fused("weight"), fused("bias")
        rows = [*ROWS, qkv, gate_up]
        if model.attention.bias:
            rows.append(qkv_bias)
        if model.feed_forward.bias:
            rows += [
                gate_up_bias,
                Row.of(f"{OURS}.attention.to_out.bias", f"{LAYER}.self_attn.o_proj.bias"),
                Row.of(f"{OURS}.feed_forward.down.bias", f"{LAYER}.mlp.down_proj.bias"),
            ]
        if model.attention.qk_norm:
            rows += [Row.of(f"{OURS}.attention.{x}_norm.weight", f"{LAYER}.self_attn.{x}_norm.weight") for x in "qk"]
        return rows

    # ------------------------------------------------------------------------------- from theirs

    def model(self, theirs: Theirs) -> dict[str, Any]:
        """Our `model` section."""
        theirs.must("hidden_act", ["silu"], "our gated feed-forward has SiLU")
        return shared_section(theirs) | {
            "norm": {"kind": "rms_norm", "eps": theirs.get("rms_norm_eps", 1e-6)},
            "attention": self.attention(theirs),
            "feed_forward": {"kind": "swiglu", "bias": theirs.get("mlp_bias", False)},
        }

    def attention(self, theirs: Theirs) -> dict[str, Any]:
        bias = theirs.get("attention_bias", False)
        if bias != theirs.get("mlp_bias", False):
            theirs.problems.append("attention_bias and mlp_bias differ: our output projections have a bias together")
        return {"kind": "causal", "bias": bias}

    # ------------------------------------------------------------------------------- to theirs

    def unsupported_reasons(self, model: Any) -> list[str]:
        """Why our `model` cannot be one of this family."""
        found = [*self.shape_reasons(model), *plain_embedding_reasons(model)]
        if model.attention.kind != "causal":
            found.append(f"attention is {model.attention.kind}, theirs is causal")
        if model.attention.qk_norm:
            found.append("queries and keys are normalised, theirs are not")
        if model.attention.bias != model.feed_forward.bias:
            found.append("only one of attention and feed_forward has biases, theirs have them together")
        return found

    def shape_reasons(
        self,
        model: Any,
        norm: str = "rms_norm",
        feed_forward: str = "swiglu",
        placement: str = "pre",
        qk_norm_over: str = "head",
    ) -> list[str]:
        """What the whole kin of Llama has in common, up to the kinds named."""
        wanted = {"norm": norm, "feed_forward": feed_forward}
        found = [
            f"{part} is {getattr(model, part).kind}, theirs is {kind}"
            for part, kind in wanted.items()
            if getattr(model, part).kind != kind
        ]
        if not isinstance(model.position, Rotary):
            found.append(f"position is {model.position.kind}, theirs is rotary")
        elif model.position.share != 1:
            found.append(f"position.share is {model.position.share}, theirs turns each head as a whole")
        if model.norm.placement != placement:
            found.append(f"norm.placement is {model.norm.placement}, theirs is {placement}")
        if model.attention.qk_norm and model.attention.qk_norm_over != qk_norm_over:
            over = model.attention.qk_norm_over
            found.append(f"attention.qk_norm_over is {over}, theirs is {qk_norm_over}")
        return found

    def config(self, model: Any) -> dict[str, Any]:
        """Their keys; the sizes that every family shares are added by the caller."""
        return shared_config(model) | {"attention_bias": model.attention.bias, "mlp_bias": model.feed_forward.bias}


def shared_section(theirs: Theirs, *, head_dim: int | None = None, tied: bool = False) -> dict[str, Any]:
    """What the whole kin of Llama has in common of our `model` section; `head_dim` and `tied` where they do not say."""
    n_heads = theirs.need("num_attention_heads")
    return {
        "kind": "decoder",
        "vocab_size": theirs.need("vocab_size"),
        "d_model": theirs.need("hidden_size"),
        "n_layers": theirs.need("num_hidden_layers"),
        "n_heads": n_heads,
        "n_kv_heads": theirs.get("num_key_value_heads", n_heads),
        "head_dim": theirs.get("head_dim", head_dim),
        "d_ff": theirs.need("intermediate_size"),
        "tie_embeddings": theirs.get("tie_word_embeddings", tied),
        "position": whole_rope(theirs),
    }


def whole_rope(theirs: Theirs) -> dict[str, Any]:
    section = theirs.rope()
    if (share := section.pop("share", 1.0)) != 1:
        theirs.problems.append(f"only {share} of each head is turned by rotary positions, which this family never does")
    return section


def shared_config(model: Any) -> dict[str, Any]:
    return {
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.width_of_head,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm.eps,
        "initializer_range": model.init_std,
        **their_rope(model.position),
    }
