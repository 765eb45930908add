"""Sampling with a cache is sampling by full passes; it depends on the prompt and the seed and on nothing else."""

import dataclasses
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.base.errors import ConfigError, RunError
from megatrain.data.tokenizer import Tokenizer, with_in_front
from megatrain.generate import sample
from megatrain.generate.choose import Choosing
from megatrain.generate.sample import Continuation, begin, encode_prompt, generate, proceed
from megatrain.models.decoder import Decoder
from megatrain.nn.attention.sliding_window import SlidingWindow
from megatrain.nn.norm.layer_norm import LayerNorm
from megatrain.nn.position.learned import Learned
from megatrain.nn.position.none import NoPosition
from megatrain.nn.where import KeyValueCache, Where
from tests.generate.toy import SEQ_LEN, SHAPE, loaded, tokenizer, tokenizer_bytes

PROMPTS = ["def main(argv):", "", "日本", "z", "def main(argv):", "Zwölf Boxkämpfer jagen"]

CHOICES = {
    "rotary": Decoder(**SHAPE),
    "learned": Decoder(**SHAPE, position=Learned()),
    "none": Decoder(**SHAPE, position=NoPosition()),
    "window": Decoder(**SHAPE, attention=SlidingWindow(window=3, qk_norm=True)),
    "post-norm": Decoder(**SHAPE, norm=LayerNorm(placement="post"), tie_embeddings=False),
}


def by_full_passes(of, prompt: str, n: int, choosing: Choosing, uniforms: torch.Tensor) -> list[int]:
    """The slow twin: everything is read again for each token."""
    ids = of.tokenizer.encode(prompt) or [of.tokenizer.end_of_document]
    n_prompt = len(ids)
    for i in range(n):
        positions = torch.arange(len(ids))[None]
        where = Where(positions, torch.zeros_like(positions, dtype=torch.int32))
        token = int(choosing.choose(of.model.logits(torch.tensor([ids]), where)[:, -1], uniforms[i : i + 1]))
        if token == of.tokenizer.end_of_document:
            break
        ids.append(token)
    return ids[n_prompt:]


def continued(of, prompts: list[str], choosing: Choosing = Choosing(), **options) -> list[Continuation]:  # noqa: B008
    rows = begin(of, prompts, **({"max_tokens": 8} | options))
    for _ in proceed(of, rows, choosing):
        pass
    return rows


# ------------------------------------------------------------------------------------------------ the cache


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("choosing", [Choosing(temperature=0), Choosing(top_k=20, top_p=0.9)], ids=["greedy", "drawn"])
def test_tokens_are_those_of_full_passes(choice, choosing):
    of = loaded(choice)
    for row in continued(of, PROMPTS, choosing):
        assert row.tokens == by_full_passes(of, row.prompt, 8, choosing, row.uniforms)


def test_the_logits_of_the_latest_tokens_are_those_of_all_tokens_cut():
    tokens, caches = torch.tensor([[5, 7, 1, 9], [2, 2, 3, 4]]), [KeyValueCache(5), KeyValueCache(5)]
    every, latest = (loaded().model.decode(tokens, cache, latest=n) for cache, n in zip(caches, (None, 2), strict=True))
    torch.testing.assert_close(latest, every[:, -2:])
    again = [loaded().model.decode(tokens[:, :1], cache, latest=1) for cache in caches]
    assert torch.equal(*again), "the cache holds all of them"


def test_greedy_is_what_transformers_generates_from_the_same_weights():
    import transformers

    ours = loaded(Decoder(**SHAPE))
    model = copied_to_llama(transformers, ours.model)
    rows = continued(ours, PROMPTS, Choosing(temperature=0), max_tokens=12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row in rows:
            ids = torch.tensor([row.ids[: row.n_prompt]])
            theirs = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=12,
                do_sample=False,
                eos_token_id=tokenizer().end_of_document,
                pad_token_id=tokenizer().end_of_document,
            )[0, row.n_prompt :].tolist()
            assert [i for i in theirs if i != tokenizer().end_of_document] == row.tokens
    assert any(len(set(row.tokens)) > 3 for row in rows), "a model that repeats itself proves little"


def copied_to_llama(transformers, model):
    """Our decoder's weights in the transformers library's Llama."""
    c = model.choice
    config = transformers.LlamaConfig(
        vocab_size=model.n_valid,
        hidden_size=c.d_model,
        intermediate_size=c.d_ff,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.kv_heads,
        rms_norm_eps=c.norm.eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.position.theta},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    ours, theirs = dict(model.named_parameters()), {}
    theirs["model.embed_tokens.weight"] = theirs["lm_head.weight"] = ours["embedding.weight"]
    theirs["model.norm.weight"] = ours["norm.weight"]
    kv = c.kv_heads * c.width_of_head
    for i in range(c.n_layers):
        here, there = f"layers.{i}.", f"model.layers.{i}."
        q, k, v = ours[here + "attention.to_qkv.weight"].split([c.n_heads * c.width_of_head, kv, kv])
        gate, up = ours[here + "feed_forward.gate_up.weight"].chunk(2)
        theirs |= {
            there + "self_attn.q_proj.weight": q,
            there + "self_attn.k_proj.weight": k,
            there + "self_attn.v_proj.weight": v,
            there + "self_attn.o_proj.weight": ours[here + "attention.to_out.weight"],
            there + "mlp.gate_proj.weight": gate,
            there + "mlp.up_proj.weight": up,
            there + "mlp.down_proj.weight": ours[here + "feed_forward.down.weight"],
            there + "input_layernorm.weight": ours[here + "attention_norm.weight"],
            there + "post_attention_layernorm.weight": ours[here + "feed_forward_norm.weight"],
        }
    llama = transformers.LlamaForCausalLM(config).eval()
    llama.load_state_dict(theirs)
    return llama


# ------------------------------------------------------------------------------------------------ company and seed


@pytest.mark.parametrize("choosing", [Choosing(temperature=0), Choosing()], ids=["greedy", "drawn"])
def test_a_prompt_in_company_continues_as_it_does_alone(choosing, monkeypatch):
    monkeypatch.setattr(sample, "ROWS_AT_ONCE", 4)  # so that there is more than one group
    together = continued(loaded(), PROMPTS, choosing)
    for row in together[:4] + together[5:]:  # the fifth prompt is the first again
        (alone,) = continued(loaded(), [row.prompt], choosing)
        assert (row.ids, row.text, row.ended) == (alone.ids, alone.text, alone.ended)


def test_texts_come_in_the_order_of_their_prompts():
    options = {"max_tokens": 5, "temperature": 0}
    assert generate(loaded(), PROMPTS, **options) == [generate(loaded(), prompt, **options) for prompt in PROMPTS]


def test_the_same_seed_gives_the_same_texts_and_others_give_others():
    first = generate(loaded(), ["a"] * 3, seed=5, max_tokens=10)
    assert generate(loaded(), ["a"] * 3, seed=5, max_tokens=10) == first
    assert len(set(first)) == 3, "the same prompt again is another sample"
    assert not set(first) & set(generate(loaded(), ["a"] * 3, seed=6, max_tokens=10))


def test_sampling_leaves_torchs_own_generator_alone():
    before = torch.random.get_rng_state()
    generate(loaded(), "a", max_tokens=3)
    assert torch.equal(torch.random.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------ text and ends


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_what_is_streamed_is_the_whole_text(seed):
    rows = begin(loaded(), ["日", "a"], max_tokens=12, seed=seed)
    shown = {id(row): "" for row in rows}
    for row, piece in proceed(loaded(), rows, Choosing()):
        shown[id(row)] += piece
    for row in rows:
        assert shown[id(row)] == row.text == tokenizer().decode(row.tokens)


def ends_after(of, prompt: str, n: int):
    """The same model, but with the n-th token that it would choose as the one that ends a document."""
    tokens = continued(of, [prompt], Choosing(temperature=0), max_tokens=n + 1)[0].tokens
    assert tokens[n] not in tokens[:n]
    return dataclasses.replace(of, tokenizer=dataclasses.replace(of.tokenizer, end_of_document=tokens[n]))


def test_a_row_ends_at_the_end_of_its_document_and_the_others_go_on():
    of = ends_after(loaded(), "z", 2)
    rows = continued(of, PROMPTS, Choosing(temperature=0))
    assert [row.ended for row in rows if row.prompt == "z"] == ["end_of_document"]
    (z,) = (row for row in rows if row.prompt == "z")
    assert len(z.tokens) == 2
    assert z.text == tokenizer().decode(z.tokens)
    others = [row for row in rows if row.ended == "max_tokens"]
    assert others
    assert all(len(row.tokens) == 8 for row in others)


def test_text_ends_before_a_stop_string():
    (free,) = continued(loaded(), ["a"], max_tokens=20)
    assert len(free.text) > 6
    (stopped,) = continued(loaded(), ["a"], max_tokens=20, stop=(free.text[3:5], "never"))
    assert stopped.text == free.text[: free.text.index(free.text[3:5])]
    assert stopped.ended == "stop"
    assert len(stopped.tokens) < len(free.tokens)


def test_what_began_like_a_stop_string_is_text_when_nothing_follows():
    (free,) = continued(loaded(), ["a"])
    (held,) = continued(loaded(), ["a"], stop=(free.text[-1] + "\x00never",))
    assert (held.text, held.ended) == (free.text, "max_tokens")


def test_an_empty_prompt_begins_a_document():
    (row,) = continued(loaded(), [""], Choosing(temperature=0))
    assert row.ids[0] == tokenizer().end_of_document
    assert row.n_prompt == 1


def test_learned_positions_end_where_they_end():
    of = loaded(CHOICES["learned"])
    endless = dataclasses.replace(of, tokenizer=dataclasses.replace(of.tokenizer, end_of_document=-1))
    greedy = Choosing(temperature=0)
    rows = continued(endless, ["def main(argv):", "z"], greedy, max_tokens=100)
    assert [row.ended for row in rows] == ["positions", "positions"]
    assert [len(row.ids) for row in rows] == [SEQ_LEN + 1] * 2  # the last token is chosen, and never read
    assert rows[0].tokens == by_full_passes(endless, rows[0].prompt, len(rows[0].tokens), greedy, torch.ones(99))


# ------------------------------------------------------------------------------------------------ errors


def test_a_prompt_longer_than_the_learned_positions_is_refused():
    prompt = "x y" * SEQ_LEN
    with pytest.raises(
        ConfigError, match=rf"the prompt has \d+ tokens and this model has learned positions for {SEQ_LEN}"
    ):
        generate(loaded(CHOICES["learned"]), prompt)
    generate(loaded(), prompt, max_tokens=1)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [({"max_tokens": 0}, "max_tokens=0"), ({"stop": [""]}, "a stop string is empty"), ({"top_p": 7}, "top_p=7")],
)
def test_a_wrong_option_is_one_sentence(wrong, sentence):
    with pytest.raises(ConfigError, match=sentence) as error:
        generate(loaded(), "a", **wrong)
    assert len(error.value.problems) == 1


def test_damaged_weights_are_noticed_and_not_sampled():
    of = loaded(Decoder(**SHAPE), seed=99)
    of.model.norm.weight.data[3] = float("nan")
    with pytest.raises(RunError, match="not finite after 1 tokens"):
        generate(of, "a")


def test_a_prompt_begins_a_document_as_the_rows_of_a_run_do():
    ours = dataclasses.replace(loaded(), config={"train": {"steps": 3}})
    end = ours.tokenizer.end_of_document
    assert encode_prompt(ours, "def ") == [end, *ours.tokenizer.encode("def ")]
    assert encode_prompt(ours, "") == [end]
    converted = dataclasses.replace(ours, config={})
    assert encode_prompt(converted, "def ") == ours.tokenizer.encode("def ")
    assert encode_prompt(converted, "") == [end]
    said = Tokenizer.parse(with_in_front(tokenizer_bytes(), end), "here")
    assert encode_prompt(dataclasses.replace(converted, tokenizer=said), "def ") == [end, *said.encode("def ")]
