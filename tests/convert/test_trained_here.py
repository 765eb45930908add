"""A model of ours in transformers: the same greedy tokens, its tokenizer with it."""

import json

import pytest
import torch
import transformers
from click.testing import CliRunner

from megatrain.checkpoint.model import build_model, model_choice
from megatrain.checkpoint.read import find
from megatrain.checkpoint.stream import average, write_checkpoint
from megatrain.cli.convert import command
from megatrain.convert.check import logits
from megatrain.convert.deepspeed import from_deepspeed, to_deepspeed
from megatrain.convert.hugging_face import from_hugging_face, to_hugging_face
from megatrain.data.tokenizer import Tokenizer, train_tokenizer, with_in_front
from megatrain.generate.load import load
from megatrain.generate.sample import encode_prompt
from megatrain.nn.where import KeyValueCache
from megatrain.parallel.shard import initialise

TEXTS = ["def main(x):\n    return x + 1\n", "the quick brown fox jumps over the lazy dog"] * 20
SEQ_LEN = 64


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    content = train_tokenizer(TEXTS, 280)
    return Tokenizer.parse(content, "here")


@pytest.fixture(scope="module")
def content() -> bytes:
    return train_tokenizer(TEXTS, 280)


def checkpoint(folder, content: bytes, **options):
    """What a run leaves: a step's folder, the tokenizer in the run's."""
    tokenizer = Tokenizer.parse(content, "here")
    section = {"kind": "decoder", "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 48, "init_std": 0.2} | options
    model = model_choice(section, "here").build(n_valid=tokenizer.vocab_size, seq_len=SEQ_LEN)
    initialise(model, seed=1)
    facts = {"config": {"model": section, "data": {"seq_len": SEQ_LEN}}, "tokenizer": tokenizer.fingerprint}
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(content)
    held = (("weights", name, p.detach()) for name, p in model.named_parameters())
    return write_checkpoint(folder / "checkpoints" / "step-00000007", held, step=7, state=None, facts=facts)


def greedy(model, tokens: list[int], n: int) -> list[int]:
    cache = KeyValueCache(len(tokens) + n)
    logits, found = model.decode(torch.tensor([tokens]), cache), []
    for _ in range(n):
        found.append(int(logits[0, -1].argmax()))
        logits = model.decode(torch.tensor([found[-1:]]), cache)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"n_kv_heads": 2},
        {"n_kv_heads": 2, "tie_embeddings": False, "attention": {"kind": "causal", "qk_norm": True}},
        {"attention": {"kind": "sliding_window", "window": 5}, "vocab_size": 320},
        {
            "norm": {"kind": "layer_norm"}, "position": {"kind": "learned"},
            "attention": {"kind": "causal", "bias": True}, "feed_forward": {"kind": "gelu", "bias": True},
        },
        {
            "norm": {"kind": "layer_norm", "placement": "parallel"}, "tie_embeddings": False,
            "position": {"kind": "rotary", "share": 0.5},
            "attention": {"kind": "causal", "bias": True}, "feed_forward": {"kind": "gelu", "bias": True},
        },
        {
            "norm": {"kind": "zero_centred_rms_norm"}, "feed_forward": {"kind": "geglu"}, "scale_embeddings": True,
            "n_kv_heads": 1, "head_dim": 16,
        },
        {
            "norm": {"kind": "rms_norm", "placement": "output"}, "tie_embeddings": False,
            "attention": {"kind": "causal", "qk_norm": True, "qk_norm_over": "width"}, "n_kv_heads": 2,
        },
        {"n_kv_heads": 2, "attention": {"kind": "causal", "bias": True}},
    ],
    ids=["llama", "qwen3", "mistral", "gpt2", "gpt_neox", "gemma", "olmo2", "qwen2"],
)  # fmt: skip
def test_transformers_generates_the_same_greedy_tokens(options, content, tmp_path, request):
    commit = checkpoint(tmp_path / "run", content, **options)
    report = to_hugging_face(tmp_path / "run", tmp_path / "out")
    assert report.family == request.node.callspec.id
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").encode(
        "the lazy fox", add_special_tokens=False
    )
    assert tokens == Tokenizer.parse(content, "here").encode("the lazy fox")
    wanted = theirs.generate(
        torch.tensor([tokens]), do_sample=False, max_new_tokens=12, min_new_tokens=12, pad_token_id=0,
        attention_mask=torch.ones(1, len(tokens), dtype=torch.long), eos_token_id=None,
    )  # fmt: skip
    assert greedy(build_model(commit), tokens, 12) == wanted[0, len(tokens) :].tolist()


def test_the_way_back_keeps_the_tokenizer_and_its_end_of_document(content, tokenizer, tmp_path):
    checkpoint(tmp_path / "run", content)
    call = CliRunner().invoke(command, ["to-hf", str(tmp_path / "run"), "--out", str(tmp_path / "hf")])
    assert json.loads(call.stdout)["tokens"] == 128
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.end_of_document
    call = CliRunner().invoke(command, ["from-hf", str(tmp_path / "hf"), "--out", str(tmp_path / "again")])
    assert call.exit_code == 0, call.output
    facts = find(tmp_path / "again").manifest.facts
    assert facts["tokenizer"] == {"fingerprint": tokenizer.fingerprint, "end_of_document": tokenizer.end_of_document}
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == content


def trained(folder, content: bytes, states=("weights",), facts=None, **options):
    """A checkpoint as `megatrain train` leaves it: its config has a `train` section."""
    commit = checkpoint(folder, content, **options)
    facts = commit.manifest.facts | (facts or {})
    facts["config"]["train"] = {}
    held = ((state, name, commit.reader().read_full(name)) for state in states for name in commit.reader().names())
    return write_checkpoint(folder / "checkpoints" / "step-00000008", held, step=8, state=None, facts=facts)


def told(content: bytes) -> dict:
    held = Tokenizer.parse(content, "here")
    return {"tokenizer": {"fingerprint": held.fingerprint, "end_of_document": 0, "vocab_size": held.vocab_size}}


@pytest.mark.parametrize("known_by", ["the checkpoint", "the tokenizer's file"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rows_that_fill_the_vocabulary_up_are_not_tokens_of_theirs(tied, known_by, content, tmp_path):
    """They were in no softmax here, and would be in that of transformers."""
    facts = told(content) if known_by == "the checkpoint" else None
    commit = trained(tmp_path / "run", content, facts=facts, vocab_size=320, tie_embeddings=tied)
    n = Tokenizer.parse(content, "here").vocab_size
    assert commit.reader().shapes()["embedding.weight"] == (320, 32)
    assert n < 320
    assert to_hugging_face(tmp_path / "run", tmp_path / "hf").passed
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert theirs.config.vocab_size == n
    tokens = torch.arange(40)[None]
    mine = build_model(commit, n_valid=n).eval()
    assert mine.n_valid == n
    torch.testing.assert_close(theirs(tokens).logits.softmax(-1), logits(mine, tokens).softmax(-1))


def test_rows_that_fill_the_vocabulary_up_do_not_go_to_deepspeed(content, tmp_path):
    trained(tmp_path / "run", content, ("weights", "exp_avg", "exp_avg_sq"), told(content), vocab_size=320)
    assert to_deepspeed(tmp_path / "run", tmp_path / "universal").passed
    assert to_deepspeed(tmp_path / "run", tmp_path / "zero", ranks=2).passed
    for name in ("universal", "zero"):
        from_deepspeed(tmp_path / name, tmp_path / name, tmp_path / f"{name}-ours")
        reader = find(tmp_path / f"{name}-ours").reader()
        n = Tokenizer.parse(content, "here").vocab_size
        assert {reader.shapes(state)["embedding.weight"] for state in reader.states()} == {(n, 32)}


def test_all_rows_of_a_converted_model_go_back(content, tmp_path):
    """Its authors' model has them in its softmax, whatever the tokenizer says."""
    checkpoint(tmp_path / "run", content, vocab_size=320)
    to_hugging_face(tmp_path / "run", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == 320
    from_hugging_face(tmp_path / "hf", tmp_path / "ours")
    to_hugging_face(tmp_path / "ours", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["vocab_size"] == 320


def without_template(content: bytes) -> bytes:
    return json.dumps(json.loads(content) | {"post_processor": None}).encode()


@pytest.mark.parametrize("ours", [True, False], ids=["our_tokenizer", "another_one"])
def test_transformers_reads_a_text_behind_an_end_of_document_as_generate_does(ours, content, tmp_path):
    content = content if ours else without_template(content)
    trained(tmp_path / "run", content)
    wanted = encode_prompt(load(tmp_path / "run"), "the lazy fox")
    to_hugging_face(tmp_path / "run", tmp_path / "hf")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")("the lazy fox")["input_ids"] == wanted
    from_hugging_face(tmp_path / "hf", tmp_path / "again")
    assert encode_prompt(load(tmp_path / "again"), "the lazy fox") == wanted
    assert wanted[0] == Tokenizer.parse(content, "here").end_of_document
    assert ((tmp_path / "hf" / "tokenizer.json").read_bytes() == content) is ours


def test_a_tokenizer_that_puts_something_else_in_front_is_believed_where_the_model_was_not_trained_here(
    content, tmp_path
):
    held = Tokenizer.parse(content, "here")
    bos = held.encode("f")[0]
    checkpoint(tmp_path / "run", with_in_front(content, bos))
    assert encode_prompt(load(tmp_path / "run"), "x") == [bos, *held.encode("x")]
    trained(tmp_path / "trained", with_in_front(content, bos))
    assert encode_prompt(load(tmp_path / "trained"), "x") == [held.end_of_document, *held.encode("x")]
    to_hugging_face(tmp_path / "trained", tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")("x")["input_ids"]
    assert theirs == [held.end_of_document, *held.encode("x")]


def test_an_average_keeps_the_tokenizer_and_what_lies_beside_it(content, tmp_path):
    checkpoint(tmp_path / "run", content)
    to_hugging_face(tmp_path / "run", tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    from_hugging_face(tmp_path / "hf", tmp_path / "a")
    average([tmp_path / "a", tmp_path / "a"], tmp_path / "of converted")
    average([tmp_path / "run", tmp_path / "run"], tmp_path / "of a run")
    for name in ("of converted", "of a run"):
        assert load(tmp_path / name).tokenizer.fingerprint == Tokenizer.parse(content, "here").fingerprint
    to_hugging_face(tmp_path / "of converted", tmp_path / "back")
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_ids_and_rates_of_a_foreign_config_come_back_as_they_were(content, tmp_path):
    checkpoint(tmp_path / "run", content)
    to_hugging_face(tmp_path / "run", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    said = {
        "bos_token_id": 3, "eos_token_id": [0, 5], "pad_token_id": 7, "initializer_range": 0.01, "use_cache": False,
    }  # fmt: skip
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    from_hugging_face(tmp_path / "hf", tmp_path / "ours")
    to_hugging_face(tmp_path / "ours", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(path.read_text())
