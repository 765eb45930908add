"""Qwen 2 and 2.5 (Yang et al. 2024, arXiv:2407.10671): Llama with biases of queries, keys and values."""

from dataclasses import dataclass
from typing import Any, ClassVar

from megatrain.convert.families import FAMILY
from megatrain.convert.families.gpt2 import plain_embedding_reasons
from megatrain.convert.families.llama import Llama, shared_config
from megatrain.convert.table import Theirs


@FAMILY.register("qwen2")
@dataclass(frozen=True)
class Qwen2(Llama):
    architecture: ClassVar[str] = "Qwen2ForCausalLM"

    def attention(self, theirs: Theirs) -> dict[str, Any]:
        full_attention_only(theirs)
        return {"kind": "causal", "bias": True}

    def unsupported_reasons(self, model: Any) -> list[str]:
        found = self.shape_reasons(model) + plain_embedding_reasons(model)
        a = model.attention
        if a.kind != "causal" or a.qk_norm or not a.bias or model.feed_forward.bias:
            found.append("theirs is causal attention with biases of queries, keys and values, and no other biases")
        if model.width_of_head * model.n_heads != model.d_model:
            found.append("head_dim is not d_model / n_heads, as theirs is")
        return found

    def config(self, model: Any) -> dict[str, Any]:
        return shared_config(model) | {"use_sliding_window": False}


def full_attention_only(theirs: Theirs) -> None:
    """Their configs can give some layers a window; ours gives it to all or none."""
    if theirs.get("use_sliding_window", False):
        theirs.problems.append("use_sliding_window gives some layers a window: ours have it all or none")
    theirs.get("sliding_window")
    if set(theirs.get("layer_types", [])) - {"full_attention"}:
        theirs.problems.append("layer_types has layers without full attention: ours are all alike")
