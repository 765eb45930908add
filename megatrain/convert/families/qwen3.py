"""Qwen 3 (Yang et al. 2025, arXiv:2505.09388): Llama with norms of queries and keys, over each head."""

from dataclasses import dataclass
from typing import Any, ClassVar

from megatrain.convert.families import FAMILY
from megatrain.convert.families.gpt2 import plain_embedding_reasons
from megatrain.convert.families.llama import Llama, shared_config
from megatrain.convert.families.qwen2 import full_attention_only
from megatrain.convert.table import Theirs


@FAMILY.register("qwen3")
@dataclass(frozen=True)
class Qwen3(Llama):
    architecture: ClassVar[str] = "Qwen3ForCausalLM"

    def attention(self, theirs: Theirs) -> dict[str, Any]:
        full_attention_only(theirs)
        theirs.must("attention_bias", [False], "our output projection has a bias only with the feed-forward's")
        return {"kind": "causal", "qk_norm": True}

    def unsupported_reasons(self, model: Any) -> list[str]:
        found = self.shape_reasons(model) + plain_embedding_reasons(model)
        a = model.attention
        if a.kind != "causal" or not a.qk_norm or a.bias or model.feed_forward.bias:
            found.append("theirs is causal attention with norms of queries and keys, and no biases")
        return found

    def config(self, model: Any) -> dict[str, Any]:
        return shared_config(model) | {"attention_bias": False, "use_sliding_window": False}
