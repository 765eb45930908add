"""The decoder in one process: what it refuses, counts, and never lets leak; cached decoding against the full pass."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import yaml
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatrain.models.decoder import Decoder, DecoderModel
from megatrain.nn.attention import ATTENTION
from megatrain.nn.attention.causal import Causal
from megatrain.nn.attention.sliding_window import SlidingWindow
from megatrain.nn.feed_forward import FEED_FORWARD
from megatrain.nn.feed_forward.gelu import GELU
from megatrain.nn.norm import NORM
from megatrain.nn.norm.layer_norm import LayerNorm
from megatrain.nn.position import POSITION
from megatrain.nn.position.learned import Learned
from megatrain.nn.position.rotary import Rotary
from megatrain.nn.where import KeyValueCache, Where
from megatrain.parallel.mesh import Axis
from megatrain.parallel.shard import initialise
from megatrain.parallel.tensor import TensorParallel
from megatrain.train.config import read_run
from tests.contract import assert_near, batch, error, examples, randomise, where

N_VALID, SEQ_LEN = 37, 12


def choice(**changes) -> Decoder:
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48}
    return Decoder(**(sizes | changes))


def model_of(choice: Decoder, seq_len: int = SEQ_LEN) -> DecoderModel:
    model = choice.build(n_valid=N_VALID, seq_len=seq_len)
    initialise(model, seed=1)
    return model


def tokens(n_rows: int = 2, n: int = SEQ_LEN) -> torch.Tensor:
    return torch.randint(N_VALID, (n_rows, n), generator=torch.Generator().manual_seed(2))


# ------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"d_model": 30}, "d_model=30 does not divide by n_heads=4"),
        ({"n_kv_heads": 3}, "n_kv_heads=3 does not divide n_heads=4: pick it from [1, 2, 4]"),
        ({"n_kv_heads": 0}, "n_kv_heads=0"),
        ({"n_layers": 0}, "n_layers=0: it must be at least 1"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
    ],
)
def test_what_cannot_be_built_is_refused_in_a_sentence(changes, sentence):
    assert any(sentence in problem for problem in choice(**changes).problems())


def test_what_can_be_built_has_no_problems():
    assert choice().problems() == []
    assert choice(d_model=30, head_dim=8).problems() == []
    assert choice(head_dim=7, position=Learned()).problems() == []


def test_a_layout_that_cuts_heads_is_refused_with_what_would_do():
    assert choice().layout_problems(2) == []
    assert choice().layout_problems(4) == []  # two ranks hold each of the two key-value heads
    assert choice(n_heads=12, n_kv_heads=4, head_dim=8).layout_problems(6) == [
        "model.n_kv_heads=4 can be neither split over tp=6 nor held by equally many of its ranks: pick tp from "
        "[1, 2, 4, 12], or change model.n_kv_heads"
    ]
    assert "qk_norm_over=head" in choice(attention=Causal(qk_norm=True, qk_norm_over="width")).layout_problems(4)[0]


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused():
    assert choice(vocab_size=36).vocabulary_problems(37) != []
    assert choice(vocab_size=64).vocabulary_problems(37) == choice().vocabulary_problems(37) == []


def test_logits_are_refused_on_a_cut_model():
    model = choice().build(n_valid=N_VALID, seq_len=SEQ_LEN, tp=TensorParallel(Axis("tp", 2)))
    with pytest.raises(ValueError, match="load the model with tp=1"):
        model.logits(tokens(), where((SEQ_LEN,), (SEQ_LEN,)))


# ------------------------------------------------------------------------------------------------ counted


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_without_memory(tied):
    c = choice(tie_embeddings=tied, vocab_size=40)
    assert c.n_parameters(N_VALID) == sum(p.numel() for p in model_of(c).parameters())


IN_PLACE = {torch.ops.aten.addmm_: lambda total, a, b, *_, **__: 2 * a[0] * a[1] * b[1]}
"""What torch's counter does not know."""


def counted_flops(c: Decoder, n_rows: int) -> float:
    model, given = model_of(c), batch(*[(SEQ_LEN,)] * n_rows, vocab_size=N_VALID)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        loss, _ = model(given)
        loss.backward()
    return counter.get_total_flops() / (n_rows * SEQ_LEN)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False},
        {"head_dim": 16},
        {"feed_forward": GELU(), "attention": SlidingWindow(window=3)},
        {"vocab_size": 48},
    ],
    ids=["tied", "untied", "wide heads", "gelu", "padded"],
)
def test_palm_flops_are_what_torch_counts(changes):
    """With attention written out, torch counts the whole square; the head's padding is never multiplied."""
    c = choice(**changes)
    assert c.flops_per_token(N_VALID, SEQ_LEN).palm == counted_flops(c, n_rows=2)


CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/*.yaml") if path.name != "gpu.yaml")
"""Every configuration that has a model."""


@pytest.mark.parametrize("name", SHIPPED)
def test_flops_of_every_shipped_model_are_what_torch_counts(name, tmp_path):
    """Without memory, so that eight billion weights are no matter."""
    file, seq_len, n_valid = tmp_path / "run.yaml", 128, 32_000
    bases = [name] if not name.startswith("model/") else ["run/tiny.yaml", name]
    file.write_text(yaml.safe_dump({"base": [str(CONFIGS / base) for base in bases]}))
    c = read_run(str(file), ["model.vocab_size=null"]).run.model
    given = batch((seq_len,), vocab_size=n_valid)
    counter = FlopCounterMode(display=False, custom_mapping=IN_PLACE)
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH), counter:
        model = c.build(n_valid=n_valid, seq_len=seq_len)
        model(given)[0].backward()
    assert counter.get_total_flops() == seq_len * c.flops_per_token(n_valid, seq_len).palm


def test_causal_flops_leave_out_half_of_the_square():
    flops = choice().flops_per_token(N_VALID, SEQ_LEN)
    square = 2 * 12 * 32 * SEQ_LEN  # layers x (scores and values, forward and twice backward) x width x keys
    assert flops.palm - flops.causal == square / 2


def test_a_window_costs_less_and_one_wider_than_the_row_costs_the_same():
    causal = choice().flops_per_token(N_VALID, 64).causal
    assert choice(attention=SlidingWindow(window=8)).flops_per_token(N_VALID, 64).causal < causal
    assert choice(attention=SlidingWindow(window=99)).flops_per_token(N_VALID, 64).causal == causal


# ------------------------------------------------------------------------------------------------ loss


def test_the_loss_at_the_start_is_that_of_a_guess():
    model, given = model_of(choice()), batch((5, 7), (12,), vocab_size=N_VALID)
    loss, count = model(given)
    assert count == given.weights.sum()
    assert float(loss.detach() / count) == pytest.approx(math.log(N_VALID), rel=0.02)


def test_the_loss_is_that_of_the_logits():
    model, given = model_of(choice(vocab_size=64)), batch((5, 7), (12,), vocab_size=N_VALID)
    randomise(model, std=0.2)
    logits = model.logits(given.tokens, Where(given.positions, given.documents, given.most_documents))
    assert logits.shape[-1] == N_VALID
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), given.targets.flatten(), reduction="none")
    assert_near(model(given)[0], (losses * given.weights.flatten()).sum())


def test_dropout_is_drawn_in_training_only_and_anew_each_step():
    model = model_of(choice(dropout=0.5))
    losses = [model(batch((12,), vocab_size=N_VALID, step=step))[0] for step in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    model.eval()
    plain = model_of(choice())
    assert model(batch((12,), vocab_size=N_VALID))[0] == plain(batch((12,), vocab_size=N_VALID))[0]


# ------------------------------------------------------------------------------------------------ leaks


kinds = pytest.mark.parametrize("attention", examples(ATTENTION))
positions = pytest.mark.parametrize("position", examples(POSITION))


@kinds
@positions
def test_a_token_changes_nothing_before_it(attention, position):
    model, given = model_of(choice(attention=attention, position=position)), tokens()
    randomise(model)
    before = model.logits(given, where((5, 7), (12,)))
    given[:, 7] = (given[:, 7] + 1) % N_VALID
    after = model.logits(given, where((5, 7), (12,)))
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


@kinds
@positions
def test_a_document_changes_nothing_in_another(attention, position):
    model, given = model_of(choice(attention=attention, position=position)), tokens(1)
    randomise(model)
    before = model.logits(given, where((5, 7)))
    given[:, :5] = (given[:, :5] + 1) % N_VALID
    after = model.logits(given, where((5, 7)))
    assert torch.equal(before[:, 5:], after[:, 5:])


# ------------------------------------------------------------------------------------------------ decoding


@kinds
@positions
def test_cached_decoding_gives_the_logits_of_the_full_pass(attention, position):
    model, given = model_of(choice(attention=attention, position=position)), tokens()
    randomise(model, std=0.2)
    full = model.logits(given, where((SEQ_LEN,), (SEQ_LEN,)))
    cache = KeyValueCache(capacity=SEQ_LEN)
    pieces = [model.decode(piece, cache) for piece in given.split([5, 1, 1, 3, 2], dim=1)]
    assert cache.length == SEQ_LEN
    assert_near(torch.cat(pieces, 1), full, 1e-5)


def test_a_full_cache_says_so():
    model, cache = model_of(choice()), KeyValueCache(capacity=4)
    model.decode(tokens(1, 4), cache)
    with pytest.raises(ValueError, match="holds 4 tokens and 5 were given"):
        model.decode(tokens(1, 1), cache)


# ------------------------------------------------------------------------------------------------ compiled


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
def test_compiled_blocks_give_the_same_gradients_and_share_one_graph():
    """More layers than torch recompiles for one function, with dropout, whose noise differs everywhere."""
    c = choice(n_layers=9, dropout=0.1, attention=Causal(qk_norm=True))
    plain, fast = model_of(c), model_of(c)
    counter = CompileCounterWithBackend("aot_eager")
    fast.compile_blocks(backend=counter)
    for step in range(3):
        given = batch((5, 7), (2, 10), vocab_size=N_VALID, seed=step, step=step)
        for model in (plain, fast):
            model.zero_grad()
            model(given)[0].backward()
        for (name, p), q in zip(plain.named_parameters(), fast.parameters(), strict=True):
            assert error(q.grad, p.grad) < 1e-5, name
    assert counter.frame_count == 2  # the other is the last norm's


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
def test_compiled_blocks_compute_in_bf16_too():
    c = choice()
    plain, fast = model_of(c), model_of(c)
    fast.compile_blocks(backend="aot_eager")
    given = batch((5, 7), (2, 10), vocab_size=N_VALID)
    for model in (plain, fast):
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = model(given)
        loss.backward()
    for (name, p), q in zip(plain.named_parameters(), fast.parameters(), strict=True):
        assert error(q.grad, p.grad) < 2e-2, name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
def test_blocks_are_compiled_while_gradients_of_another_format_are_there():
    """A last micro-batch of fewer rows is another graph, and bf16 weights have float32 gradients by then."""
    plain, fast = model_of(choice()), model_of(choice())
    for model in (plain, fast):
        for p in model.parameters():
            p.data, p.grad_dtype = p.data.bfloat16(), torch.float32
    fast.compile_blocks(backend="aot_eager")
    places = []
    for rows in (2, 1, 2):
        given = batch(*[(5, 7)] * rows, vocab_size=N_VALID)
        for model in (plain, fast):
            model(given)[0].backward()
        places.append([p.grad.data_ptr() for p in fast.parameters()])
    assert places[0] == places[1] == places[2]
    for (name, p), q in zip(plain.named_parameters(), fast.named_parameters(), strict=True):
        assert q[1].grad.dtype == torch.float32
        assert error(q[1].grad, p.grad) < 2e-2, name


# ------------------------------------------------------------------------------------------------ every combination


def test_every_combination_of_choices_builds_and_trains():
    registries = (NORM, POSITION, ATTENTION, FEED_FORWARD)
    members = [[cls.examples()[0] for _, cls in registry.items()] for registry in registries]
    for norm, position, attention, feed_forward in itertools.product(*members):
        c = choice(n_layers=1, norm=norm, position=position, attention=attention, feed_forward=feed_forward)
        assert c.problems() == []
        model = model_of(c)
        model(batch((5, 7), (12,), vocab_size=N_VALID))[0].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_names_of_parameters_are_part_of_every_checkpoint():
    found = [
        name for name, _ in model_of(choice(n_layers=1, tie_embeddings=False, norm=LayerNorm())).named_parameters()
    ]
    assert found == [
        "embedding.weight",
        "layers.0.attention_norm.weight",
        "layers.0.attention_norm.bias",
        "layers.0.attention.to_qkv.weight",
        "layers.0.attention.to_out.weight",
        "layers.0.feed_forward_norm.weight",
        "layers.0.feed_forward_norm.bias",
        "layers.0.feed_forward.gate_up.weight",
        "layers.0.feed_forward.down.weight",
        "norm.weight",
        "norm.bias",
        "head.weight",
    ]


def test_rotary_is_the_default_and_learned_positions_know_the_sequence_only():
    assert isinstance(choice().position, Rotary)
    model = model_of(choice(position=Learned()), seq_len=8)
    with pytest.raises(IndexError):
        model.logits(tokens(1, 9), where((9,)))
