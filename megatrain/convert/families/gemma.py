"""Gemma (Gemma Team 2024, arXiv:2403.08295): Llama with GeGLU, scaled embeddings and norms kept as distances from 1."""

from dataclasses import dataclass
from typing import Any, ClassVar

from megatrain.convert.families import FAMILY
from megatrain.convert.families.llama import Llama, shared_config, shared_section
from megatrain.convert.table import Theirs

ACTIVATIONS = ("gelu_pytorch_tanh", "gelu")
"""The second is what the first releases called the first."""


@FAMILY.register("gemma")
@dataclass(frozen=True)
class Gemma(Llama):
    architecture: ClassVar[str] = "GemmaForCausalLM"

    def model(self, theirs: Theirs) -> dict[str, Any]:
        theirs.must("hidden_act", ACTIVATIONS, "our GeGLU is approximated by tanh here")
        theirs.must("hidden_activation", ACTIVATIONS, "our GeGLU is approximated by tanh here")
        theirs.must("use_bidirectional_attention", [False], "our decoder looks back only")
        theirs.must("attention_bias", [False], "our output projection has a bias only with the feed-forward's")
        return shared_section(theirs, head_dim=256, tied=True) | {
            "scale_embeddings": True,
            "norm": {"kind": "zero_centred_rms_norm", "eps": theirs.get("rms_norm_eps", 1e-6)},
            "attention": {"kind": "causal"},
            "feed_forward": {"kind": "geglu", "approximate": "tanh"},
        }

    def unsupported_reasons(self, model: Any) -> list[str]:
        found = self.shape_reasons(model, norm="zero_centred_rms_norm", feed_forward="geglu")
        if not model.scale_embeddings:
            found.append("embedded tokens are not scaled, theirs are")
        if model.attention.kind != "causal" or model.attention.qk_norm or model.attention.bias:
            found.append("theirs is causal attention without biases and without norms of queries and keys")
        if getattr(model.feed_forward, "bias", False) or getattr(model.feed_forward, "approximate", "tanh") != "tanh":
            found.append("theirs is GeGLU approximated by tanh, without biases")
        return found

    def config(self, model: Any) -> dict[str, Any]:
        return shared_config(model) | {"hidden_act": "gelu_pytorch_tanh", "attention_bias": False}
