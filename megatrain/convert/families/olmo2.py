"""OLMo 2 (OLMo et al. 2025, arXiv:2501.00656): Llama with norms of what sublayers give, and of all queries and keys."""

from dataclasses import dataclass
from typing import Any, ClassVar

from megatrain.convert.families import FAMILY
from megatrain.convert.families.gpt2 import plain_embedding_reasons
from megatrain.convert.families.llama import LAYER, OURS, ROWS, Llama, fused, shared_config
from megatrain.convert.table import Row, Theirs

NORMS = {"attention_norm": "post_attention_layernorm", "feed_forward_norm": "post_feedforward_layernorm"}


@FAMILY.register("olmo2")
@dataclass(frozen=True)
class OLMo2(Llama):
    architecture: ClassVar[str] = "Olmo2ForCausalLM"

    def rows(self, model: Any) -> list[Row]:
        return [
            *(row for row in ROWS if "{i}" not in row.ours or "norm" not in row.ours),
            *fused("weight"),
            *(Row.of(f"{OURS}.{ours}.weight", f"{LAYER}.{theirs}.weight") for ours, theirs in NORMS.items()),
            *(Row.of(f"{OURS}.attention.{x}_norm.weight", f"{LAYER}.self_attn.{x}_norm.weight") for x in "qk"),
        ]

    def model(self, theirs: Theirs) -> dict[str, Any]:
        section = super().model(theirs)
        section["head_dim"] = None
        section["norm"] = {"kind": "rms_norm", "eps": theirs.get("rms_norm_eps", 1e-5), "placement": "output"}
        return section

    def attention(self, theirs: Theirs) -> dict[str, Any]:
        theirs.must("attention_bias", [False], "our output projection has a bias only with the feed-forward's")
        return {"kind": "causal", "qk_norm": True, "qk_norm_over": "width"}

    def unsupported_reasons(self, model: Any) -> list[str]:
        found = self.shape_reasons(model, placement="output", qk_norm_over="width") + plain_embedding_reasons(model)
        a = model.attention
        if a.kind != "causal" or not a.qk_norm or a.bias or model.feed_forward.bias:
            found.append("theirs is causal attention with norms of queries and keys, and no biases")
        if model.width_of_head * model.n_heads != model.d_model:
            found.append("head_dim is not d_model / n_heads, as theirs is")
        return found

    def config(self, model: Any) -> dict[str, Any]:
        return {k: v for k, v in shared_config(model).items() if k != "head_dim"} | {"attention_bias": False}
