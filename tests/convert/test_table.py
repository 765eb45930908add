"""Rows of a table, there and back: fused, transposed, grouped, stacked experts, two stacks."""

import pytest
import torch
import transformers

from megatrain.base.errors import CheckpointError
from megatrain.convert.table import Row, expanded
from tests.convert.test_hugging_face import tensors

SIZES = {"q": 8, "kv": 4, "ff": 6, "head_dim": 2}


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


def there_and_back(row: Row, theirs: list[torch.Tensor], sizes=SIZES) -> torch.Tensor:
    ours = row.join(theirs, sizes)
    again = row.split(ours, sizes)
    assert len(again) == len(theirs) == len(row.theirs)
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(again, theirs, strict=True))
    return ours


def test_a_group_of_heads_is_its_queries_then_a_key_and_a_value():
    row = Row.of("qkv", "theirs", grouped=True)
    theirs = numbered(16, 3)  # 2 groups of 2 queries, a key and a value, each 2 wide
    rows = there_and_back(row, [theirs])[:, 0] / 3
    assert rows.tolist() == [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    there_and_back(row, [numbered(16)])
    with pytest.raises(CheckpointError, match="theirs has 15 rows and its config says 16"):
        row.join([numbered(15, 3)], SIZES)


def test_experts_are_stacked_one_expert_after_the_other():
    row = Row.of("layers.{i}.up", "l.{i}.e.{e}.gate", "l.{i}.e.{e}.up", widths=("ff", "ff"), transposed=True)
    rows = list(expanded([row], {"i": 2, "e": 3}))
    assert [r.ours for r in rows] == ["layers.0.up", "layers.1.up"]
    assert rows[1].theirs == tuple(f"l.1.e.{e}.{x}" for e in range(3) for x in ("gate", "up"))
    theirs = [numbered(4, 6) + 100 * n for n in range(6)]  # theirs is [in, out]
    ours = there_and_back(rows[1], theirs)
    assert ours.shape == (3, 12, 4)
    assert torch.equal(ours[2, 6:], theirs[5].T)


def test_the_table_says_what_mixtral_holds(tmp_path):
    """Experts of their own files' names, into one tensor a layer."""
    config = transformers.MixtralConfig(
        vocab_size=11, hidden_size=8, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, head_dim=4,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    held = tensors(tmp_path)
    experts = "model.layers.{i}.block_sparse_moe.experts.{e}"
    rows = list(expanded([
        Row.of("layers.{i}.experts.gate_up", f"{experts}.w1.weight", f"{experts}.w3.weight", widths=("ff", "ff")),
        Row.of("layers.{i}.experts.down", f"{experts}.w2.weight"),
    ], {"i": 2, "e": 3}))  # fmt: skip
    assert {name for row in rows for name in row.theirs} == {name for name in held if ".experts." in name}
    for row in rows:
        ours = there_and_back(row, [held[name] for name in row.theirs])
        assert ours.shape == ((3, 12, 8) if "gate_up" in row.ours else (3, 8, 6))


def test_the_table_says_what_an_encoder_and_a_decoder_of_different_depths_hold():
    config = transformers.T5Config(
        vocab_size=11, d_model=8, d_kv=4, d_ff=6, num_layers=2, num_decoder_layers=3, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    with torch.device("meta"):
        held = transformers.T5ForConditionalGeneration(config).state_dict()

    def attention(ours: str, theirs: str) -> list[Row]:
        q, k, v = (f"{theirs}.{x}.weight" for x in "qkv")
        return [
            Row.of(f"{ours}.to_qkv", q, k, v, widths=("q", "q", "q")),
            Row.of(f"{ours}.to_out", f"{theirs}.o.weight"),
        ]

    def feed_forward(ours: str, theirs: str) -> list[Row]:
        inside = f"{theirs}.DenseReluDense"
        return [
            Row.of(f"{ours}.gate_up", f"{inside}.wi_0.weight", f"{inside}.wi_1.weight", widths=("ff", "ff")),
            Row.of(f"{ours}.down", f"{inside}.wo.weight"),
        ]

    e, d = "encoder.block.{e}.layer", "decoder.block.{d}.layer"
    table = [
        *attention("encoder.{e}.attention", f"{e}.0.SelfAttention"),
        *feed_forward("encoder.{e}.feed_forward", f"{e}.1"),
        *attention("decoder.{d}.attention", f"{d}.0.SelfAttention"),
        *attention("decoder.{d}.cross", f"{d}.1.EncDecAttention"),
        *feed_forward("decoder.{d}.feed_forward", f"{d}.2"),
    ]
    rows = list(expanded(table, {"e": 2, "d": 3}))
    theirs = [name for row in rows for name in row.theirs]
    assert len(set(theirs)) == len(theirs)
    assert set(theirs) == {
        name for name, x in held.items() if ".block." in name and x.dim() == 2 and "bias" not in name
    }
    assert len({row.ours for row in rows}) == len(rows) == 2 * 4 + 3 * 6
