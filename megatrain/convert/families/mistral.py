"""Mistral (Jiang et al. 2023, arXiv:2310.06825): Llama with attention to a sliding window."""

from dataclasses import dataclass
from typing import Any, ClassVar

from megatrain.convert.families import FAMILY
from megatrain.convert.families.gpt2 import plain_embedding_reasons
from megatrain.convert.families.llama import Llama, shared_config
from megatrain.convert.table import Theirs


@FAMILY.register("mistral")
@dataclass(frozen=True)
class Mistral(Llama):
    architecture: ClassVar[str] = "MistralForCausalLM"

    def attention(self, theirs: Theirs) -> dict[str, Any]:
        window = theirs.get("sliding_window")
        return {"kind": "causal"} if window is None else {"kind": "sliding_window", "window": window}

    def unsupported_reasons(self, model: Any) -> list[str]:
        found = self.shape_reasons(model) + plain_embedding_reasons(model)
        if model.attention.kind not in ("causal", "sliding_window"):
            found.append(f"attention is {model.attention.kind}, theirs is causal, whole or in a window")
        if model.attention.qk_norm or model.attention.bias or model.feed_forward.bias:
            found.append("there are biases or norms of queries and keys, theirs have none")
        return found

    def config(self, model: Any) -> dict[str, Any]:
        return shared_config(model) | {"sliding_window": getattr(model.attention, "window", None)}
