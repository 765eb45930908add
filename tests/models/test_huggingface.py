"""The decoder against an independent implementation: Llama of the transformers library, weights copied over."""

import pytest
import torch
import transformers
from torch import Tensor, nn

from megatrain.models.decoder import Decoder
from megatrain.nn.batch import Batch
from megatrain.nn.norm.rms_norm import RMSNorm
from megatrain.nn.position.rotary import Rotary
from megatrain.parallel.shard import initialise
from tests.contract import assert_near, randomise, where

D_MODEL, N_HEADS, N_KV_HEADS, D_FF, VOCAB_SIZE, SEQ_LEN = 48, 6, 2, 80, 61, 24


def pair(tied: bool) -> tuple[nn.Module, nn.Module]:
    """Our decoder and transformers' with the same random weights."""
    ours = Decoder(
        d_model=D_MODEL,
        n_layers=3,
        n_heads=N_HEADS,
        n_kv_heads=N_KV_HEADS,
        d_ff=D_FF,
        tie_embeddings=tied,
        norm=RMSNorm(eps=1e-6),
        position=Rotary(theta=500.0),
    ).build(n_valid=VOCAB_SIZE, seq_len=SEQ_LEN)
    initialise(ours, seed=0)
    randomise(ours, std=0.15)
    config = transformers.LlamaConfig(
        hidden_size=D_MODEL,
        num_hidden_layers=3,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_KV_HEADS,
        intermediate_size=D_FF,
        vocab_size=VOCAB_SIZE,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    theirs = transformers.LlamaForCausalLM(config)
    missing, unexpected = theirs.load_state_dict(
        translated({n: p.detach() for n, p in ours.named_parameters()}), strict=False
    )
    assert unexpected == []
    assert set(missing) <= ({"lm_head.weight"} if tied else set())
    return ours, theirs


def translated(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under transformers' names: fused products taken apart."""
    head_dim = D_MODEL // N_HEADS
    widths = [N_HEADS * head_dim, N_KV_HEADS * head_dim, N_KV_HEADS * head_dim]
    plain = {
        "attention_norm": "input_layernorm",
        "feed_forward_norm": "post_attention_layernorm",
        "attention.to_out": "self_attn.o_proj",
        "feed_forward.down": "mlp.down_proj",
    }
    found = {}
    for name, tensor in named.items():
        if not name.startswith("layers."):
            found[
                {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}[name.split(".")[0]]
                + ".weight"
            ] = tensor
            continue
        _, i, *middle, _ = name.split(".")
        into, part = f"model.layers.{i}.", ".".join(middle)
        if part == "attention.to_qkv":
            for key, piece in zip("qkv", tensor.split(widths), strict=True):
                found[f"{into}self_attn.{key}_proj.weight"] = piece
        elif part == "feed_forward.gate_up":
            for key, piece in zip(("gate", "up"), tensor.chunk(2), strict=True):
                found[f"{into}mlp.{key}_proj.weight"] = piece
        else:
            found[f"{into}{plain[part]}.weight"] = tensor
    return found


@pytest.mark.parametrize("tied", [True, False])
def test_logits_loss_and_gradients_are_those_of_transformers(tied):
    ours, theirs = pair(tied)
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()
    g = torch.Generator().manual_seed(1)
    row = torch.randint(VOCAB_SIZE, (2, SEQ_LEN + 1), generator=g)
    tokens, targets = row[:, :-1].contiguous(), row[:, 1:].contiguous()
    here = where((SEQ_LEN,), (SEQ_LEN,))

    expected = theirs(tokens).logits
    assert_near(ours.logits(tokens, here), expected, 1e-5)

    weights = torch.ones(2, SEQ_LEN)
    loss, _ = ours(Batch(tokens, targets, weights, here.positions, here.documents, most_documents=1))
    exact = nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum")
    assert_near(loss, exact, 1e-6)

    loss.backward()
    exact.backward()
    gradients = translated({name: p.grad for name, p in ours.named_parameters()})
    named = dict(theirs.named_parameters())
    assert set(gradients) == set(named)
    for name, grad in gradients.items():
        assert_near(grad, named[name].grad, 1e-4, name)
