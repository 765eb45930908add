"""Peers that are libraries of their own: their model and their loss, with our weights in it, in the usual loop.

None is a dependency; one that is not installed is left out. `pip install --no-deps -r tools/bench/peers.txt` has them,
in an environment of their own, since what they ask for contradicts itself. Each is set as its own recipes set it for
pretraining without documents to mask: causal attention through torch's `scaled_dot_product_attention`, its own loss.
"""

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from recipe import EPS, THETA, Shape, Step, by_hand, fill, weights_of
from torch import Tensor, nn


def by_head(weights: dict[tuple[str, int], Tensor], shape: Shape) -> None:
    """Add "qkv": the rows of q, k and v of the first head of keys, then of the second, and so on."""
    for i in range(shape.n_layers):
        parts = [weights[part, i].view(shape.kv_heads, -1, shape.d_model) for part in "qkv"]
        weights["qkv", i] = torch.cat(parts, 1).reshape(-1, shape.d_model)


def torchtitan(shape: Shape, bf16: bool, compiled: bool) -> Step:
    import torchtitan.models.llama3 as llama3
    from torchtitan.components.loss import cross_entropy_loss
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention

    s, library = shape, vars(llama3)
    library["get_attention_config"] = lambda _: ScaledDotProductAttention.Config()  # its configs always mask documents
    model = llama3.Llama3Model.Config(
        dim=s.d_model,
        vocab_size=s.vocab_size,
        tok_embeddings=Embedding.Config(
            num_embeddings=s.vocab_size, embedding_dim=s.d_model, param_init=library["_EMBEDDING_INIT"]
        ),
        norm=RMSNorm.Config(normalized_shape=s.d_model, param_init=library["_NORM_INIT"]),
        lm_head=Linear.Config(
            in_features=s.d_model, out_features=s.vocab_size, param_init=library["_output_linear_init"](s.d_model)
        ),
        layers=library["_build_llama3_layers"](
            fuse_qkv=True,
            n_layers=s.n_layers,
            dim=s.d_model,
            n_heads=s.n_heads,
            n_kv_heads=s.kv_heads,
            hidden_dim=s.d_ff,
            rope=ComplexRoPE.Config(dim=s.head_dim, max_seq_len=s.seq_len, theta=THETA),
            attn_backend="sdpa",
        ),
    ).build()
    with torch.no_grad():
        model.init_states()  # its table of rotations
    weights = weights_of(s)
    for i in range(s.n_layers):
        for part in "qk":  # it rotates neighbours where we rotate halves
            rows = weights[part, i].view(-1, 2, s.head_dim // 2, s.d_model)
            weights[part, i] = rows.transpose(1, 2).reshape(-1, s.d_model)
    by_head(weights, s)
    fill(
        model,
        weights,
        {
            "embedding": "tok_embeddings.weight",
            "qkv": "layers.{i}.attention.qkv_linear.wqkv.weight",
            "out": "layers.{i}.attention.wo.weight",
            "gate": "layers.{i}.feed_forward.w1.weight",
            "up": "layers.{i}.feed_forward.w3.weight",
            "down": "layers.{i}.feed_forward.w2.weight",
            "attention_norm": "layers.{i}.attention_norm.weight",
            "feed_forward_norm": "layers.{i}.ffn_norm.weight",
            "norm": "norm.weight",
            "head": "lm_head.weight",
        },
    )
    loss: Callable[..., Tensor] = cross_entropy_loss
    if compiled:
        for block in model.layers.values():
            block.compile(fullgraph=True)
        loss = torch.compile(loss)
    tokens, targets = s.rows()
    return by_hand(model, lambda: loss(model(tokens), targets) / targets.numel(), bf16, s.micro_batches, masters=True)


def litgpt(shape: Shape, bf16: bool, compiled: bool) -> Step:
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    s = shape
    model = GPT(
        Config(
            block_size=s.seq_len,
            vocab_size=s.vocab_size,
            padded_vocab_size=s.vocab_size,
            n_layer=s.n_layers,
            n_head=s.n_heads,
            n_query_groups=s.kv_heads,
            n_embd=s.d_model,
            intermediate_size=s.d_ff,
            rotary_percentage=1.0,
            rope_base=int(THETA),
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            norm_eps=EPS,
            mlp_class_name="LLaMAMLP",
        )
    )
    model.max_seq_length = s.seq_len
    weights = weights_of(s)
    for i in range(s.n_layers):
        weights["qkv", i] = torch.cat([weights[part, i] for part in "qkv"])
    fill(
        model,
        weights,
        {
            "embedding": "transformer.wte.weight",
            "qkv": "transformer.h.{i}.attn.qkv.weight",
            "out": "transformer.h.{i}.attn.proj.weight",
            "gate": "transformer.h.{i}.mlp.fc_1.weight",
            "up": "transformer.h.{i}.mlp.fc_2.weight",
            "down": "transformer.h.{i}.mlp.proj.weight",
            "attention_norm": "transformer.h.{i}.norm_1.weight",
            "feed_forward_norm": "transformer.h.{i}.norm_2.weight",
            "norm": "transformer.ln_f.weight",
            "head": "lm_head.weight",
        },
    )
    tokens, targets = s.rows()
    run = torch.compile(model) if compiled else model
    return by_hand(model, lambda: chunked_cross_entropy(run(tokens), targets, chunk_size=0), bf16, s.micro_batches)


def olmo_core(shape: Shape, bf16: bool, compiled: bool) -> Step:
    from olmo_core.nn.feed_forward import FeedForwardConfig
    from olmo_core.nn.transformer import TransformerConfig

    s = shape
    model: Any = TransformerConfig.llama_like(
        d_model=s.d_model,
        vocab_size=s.vocab_size,
        n_layers=s.n_layers,
        n_heads=s.n_heads,
        n_kv_heads=s.kv_heads,
        rope_theta=int(THETA),
        layer_norm_eps=EPS,
        feed_forward=FeedForwardConfig(hidden_size=s.d_ff, bias=False),
        fused_ops=False,
    ).build(init_device=torch.get_default_device().type)
    fill(
        model,
        weights_of(s),
        {
            "embedding": "embeddings.weight",
            "q": "blocks.{i}.attention.w_q.weight",
            "k": "blocks.{i}.attention.w_k.weight",
            "v": "blocks.{i}.attention.w_v.weight",
            "out": "blocks.{i}.attention.w_out.weight",
            "gate": "blocks.{i}.feed_forward.w1.weight",
            "up": "blocks.{i}.feed_forward.w3.weight",
            "down": "blocks.{i}.feed_forward.w2.weight",
            "attention_norm": "blocks.{i}.attention_norm.weight",
            "feed_forward_norm": "blocks.{i}.feed_forward_norm.weight",
            "norm": "lm_head.norm.weight",
            "head": "lm_head.w_out.weight",
        },
    )
    if compiled:
        model.apply_compile()
    tokens, targets = s.rows()
    return by_hand(model, lambda: model(tokens, labels=targets).loss, bf16, s.micro_batches, masters=True)


def megatron_core(shape: Shape, bf16: bool, compiled: bool) -> Step:
    """Its GPTModel with the layers that do without Transformer Engine, which its fast path on GPUs needs."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    s = shape
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(1, 1)
    _without_its_card()
    config = TransformerConfig(
        num_layers=s.n_layers,
        hidden_size=s.d_model,
        num_attention_heads=s.n_heads,
        num_query_groups=s.kv_heads,
        ffn_hidden_size=s.d_ff,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=EPS,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        bias_activation_fusion=True,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=s.vocab_size,
        max_sequence_length=s.seq_len,
        position_embedding_type="rope",
        rotary_base=int(THETA),
        share_embeddings_and_output_weights=False,
        parallel_output=True,
        fp16_lm_cross_entropy=False,
    )
    weights = weights_of(s)
    by_head(weights, s)
    for i in range(s.n_layers):
        weights["gate_up", i] = torch.cat([weights["gate", i], weights["up", i]])
    fill(
        model,
        weights,
        {
            "embedding": "embedding.word_embeddings.weight",
            "qkv": "decoder.layers.{i}.self_attention.linear_qkv.weight",
            "out": "decoder.layers.{i}.self_attention.linear_proj.weight",
            "gate_up": "decoder.layers.{i}.mlp.linear_fc1.weight",
            "down": "decoder.layers.{i}.mlp.linear_fc2.weight",
            "attention_norm": "decoder.layers.{i}.input_layernorm.weight",
            "feed_forward_norm": "decoder.layers.{i}.pre_mlp_layernorm.weight",
            "norm": "decoder.final_layernorm.weight",
            "head": "output_layer.weight",
        },
    )
    tokens, targets = s.rows()
    positions = torch.arange(s.seq_len).expand_as(tokens)
    mask = torch.ones(1, 1, s.seq_len, s.seq_len, dtype=torch.bool).triu(1)
    run = torch.compile(model) if compiled else model
    step = by_hand(model, lambda: run(tokens, positions, mask, labels=targets).float().mean(), bf16, s.micro_batches)
    if not bf16:
        return step

    def all_under_autocast() -> float:
        """Its linears multiply by the float32 weight in backward, so that needs autocast too."""
        with torch.autocast("cpu", torch.bfloat16):
            return step()

    return Step(all_under_autocast, step.kept)


def _without_its_card() -> None:
    """It asks for a GPU where none is needed: for where its rotations are, and for random states without dropout."""

    class NoStates:
        def fork(self, *_: Any, **__: Any) -> Any:
            return contextlib.nullcontext()

        def is_initialized(self) -> bool:
            return True

    vars(torch.cuda)["current_device"] = lambda: torch.device("cpu")
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron") and hasattr(module, "get_cuda_rng_tracker"):
            vars(module)["get_cuda_rng_tracker"] = lambda *_, **__: NoStates()
