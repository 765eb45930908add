"""Beam search: never worse than greedy, never better than trying everything, and equal to it when wide enough."""

import dataclasses
import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.base.errors import ConfigError, RunError
from megatrain.generate.beam import Beam, Hypothesis, beam_text, search
from megatrain.generate.sample import generate
from megatrain.models.decoder import Decoder
from megatrain.nn.where import Where
from tests.contract import randomise
from tests.generate.toy import loaded, tokenizer

V, END, LENGTH = 5, 4, 4
CPU = torch.device("cpu")
TOLERANCE = 1e-4  # of sums of four log-probabilities, from float32 logits of tens
SEEDS, PENALTIES, PROMPT = st.integers(0, 50), st.sampled_from([0.0, 0.6, 1.0, 3.0]), [0, 2]


@functools.cache
def model(seed: int):
    made = Decoder(d_model=8, n_layers=1, n_heads=2, d_ff=16).build(n_valid=V, seq_len=16)
    randomise(made, seed, std=1.0)
    return made.eval()


@functools.cache
def every_text(seed: int) -> tuple[Hypothesis, ...]:
    """All complete texts with their log-probabilities, by one full pass over all sequences of LENGTH tokens."""
    rows = torch.tensor(list(itertools.product(range(V), repeat=LENGTH)))
    read = torch.cat([torch.tensor(PROMPT).expand(len(rows), -1), rows], 1)
    positions = torch.arange(read.shape[1]).expand(len(rows), -1)
    with torch.inference_mode():
        logits = model(seed).logits(read, Where(positions, torch.zeros_like(positions, dtype=torch.int32)))
    each = logits.double().log_softmax(-1)[:, len(PROMPT) - 1 : -1].gather(-1, rows[..., None]).squeeze(-1)
    found = {}
    for row, log_probabilities in zip(rows.tolist(), each.tolist(), strict=True):
        n = row.index(END) + 1 if END in row else LENGTH
        found[tuple(row[:n])] = sum(log_probabilities[:n])
    return tuple(Hypothesis(tokens, p, greedy=False) for tokens, p in found.items())


def best_score(hypotheses, beam: Beam) -> float:
    return max(beam.score(h.log_probability, len(h.tokens)) for h in hypotheses)


def searched(seed: int, width: int, penalty: float) -> tuple[list[Hypothesis], Beam]:
    beam = Beam(width=width, length_penalty=penalty, max_tokens=LENGTH)
    return search(model(seed), PROMPT, LENGTH, beam, END, CPU), beam


@settings(max_examples=25, deadline=None)
@given(SEEDS, PENALTIES)
def test_a_beam_wide_enough_finds_the_best_of_all_texts(seed, penalty):
    found, beam = searched(seed, V**LENGTH, penalty)
    assert best_score(found[:1], beam) == pytest.approx(best_score(every_text(seed), beam), abs=TOLERANCE)


@settings(max_examples=60, deadline=None)
@given(SEEDS, PENALTIES, st.integers(1, 6))
def test_a_score_lies_between_that_of_greedy_and_that_of_the_best_text(seed, penalty, width):
    found, beam = searched(seed, width, penalty)
    exact = {h.tokens: h.log_probability for h in every_text(seed)}
    greedy: tuple[int, ...] = ()
    while greedy not in exact:
        beginnings = {
            token: [p for t, p in exact.items() if t[: len(greedy) + 1] == (*greedy, token)] for token in range(V)
        }
        greedy = (*greedy, max(range(V), key=lambda t: torch.tensor(beginnings[t]).logsumexp(0)))
    score = best_score(found[:1], beam)
    assert beam.score(exact[greedy], len(greedy)) - TOLERANCE <= score <= best_score(every_text(seed), beam) + TOLERANCE
    for h in found:
        assert h.log_probability == pytest.approx(exact[h.tokens], abs=TOLERANCE)
        assert h.greedy == (h.tokens == greedy)


@settings(max_examples=20, deadline=None)
@given(SEEDS, PENALTIES)
def test_texts_come_best_first_and_once(seed, penalty):
    found, beam = searched(seed, 4, penalty)
    scores = [beam.score(h.log_probability, len(h.tokens)) for h in found]
    assert scores == sorted(scores, reverse=True)
    assert len({h.tokens for h in found}) == len(found)


class Table:
    """A model whose next-token probabilities are a function of the whole text; its cache holds that text."""

    def __init__(self, probabilities):
        self.probabilities = probabilities

    def decode(self, tokens, cache, latest):
        texts, _ = cache.extend("text", tokens[:, None, :, None].double(), tokens[:, None, :, None])
        cache.length += tokens.shape[1]
        rows = [self.probabilities(tuple(map(int, text))) for text in texts.flatten(1)]
        return torch.tensor(rows, dtype=torch.float64).log()[:, None]


def test_greedy_is_followed_although_a_beam_alone_would_drop_it():
    """After two tokens both beams begin with 1; but what they gained, they lose at the third."""
    then = {
        (0,): [0.4, 0.35, 0.25],
        (0, 0): [0.34, 0.33, 0.33],
        (0, 1): [0.499, 0.5, 0.001],
        (0, 0, 0): [0.001, 0.998, 0.001],
    }
    model = Table(lambda text: then.get(text, [1 / 3] * 3))
    best, *others = search(model, [0], 3, Beam(width=2), -1, CPU)
    assert (best.tokens, best.greedy) == ((0, 0, 1), True)
    assert best.log_probability == pytest.approx(math.log(0.4 * 0.34 * 0.998))
    assert {h.tokens[0] for h in others} == {1}


def test_a_complete_text_is_no_reason_to_stop_while_a_longer_one_may_still_win():
    """2 ends a text at once with 0.55; 1 0 2 has 0.43, which a penalty for length makes the better one."""
    then = {(0,): [0.01, 0.44, 0.55], (0, 1): [0.99, 0.005, 0.005], (0, 1, 0): [0.005, 0.005, 0.99]}
    model = Table(lambda text: then.get(text, [1 / 3] * 3))
    found = {a: search(model, [0], 3, Beam(width=2, length_penalty=a), 2, CPU)[0].tokens for a in (0.0, 2.0)}
    assert found == {0.0: (2,), 2.0: (1, 0, 2)}


def test_one_beam_is_greedy():
    text, best = beam_text(loaded(), "def ", Beam(width=1, max_tokens=6))
    assert best.greedy
    assert text == generate(loaded(), "def ", max_tokens=6, temperature=0)


def test_some_model_has_a_better_text_than_greedy():
    """Otherwise the bounds above would hold for greedy too, and prove nothing."""
    assert any(not searched(seed, 5, 0.0)[0][0].greedy for seed in range(10))


def test_a_penalty_for_length_is_the_papers():
    assert Beam(width=1, length_penalty=0.6).score(-3.0, 7) == pytest.approx(-3.0 * 6**0.6 / 12**0.6)
    assert Beam(width=1).score(-3.0, 7) == -3.0


def test_an_end_of_document_is_no_text():
    of = loaded()
    _, free = beam_text(of, "a", Beam(width=2, max_tokens=3))
    ending = dataclasses.replace(of, tokenizer=dataclasses.replace(of.tokenizer, end_of_document=free.tokens[0]))
    text, best = beam_text(ending, "a", Beam(width=2, max_tokens=3))
    assert best.tokens[-1] in (free.tokens[0], *free.tokens[2:])
    assert text == tokenizer().decode([i for i in best.tokens if i != free.tokens[0]]) or best.tokens == free.tokens[:1]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [({"width": 0}, "beams=0"), ({"length_penalty": -1.0}, "length_penalty=-1.0"), ({"max_tokens": 0}, "max_tokens=0")],
)
def test_a_wrong_option_is_named(wrong, sentence):
    with pytest.raises(ConfigError, match=sentence):
        beam_text(loaded(), "a", Beam(**({"width": 2} | wrong)))


def test_damaged_weights_are_noticed():
    of = loaded(Decoder(d_model=8, n_layers=1, n_heads=1, d_ff=8), seed=98)
    of.model.norm.weight.data[3] = float("nan")
    with pytest.raises(RunError, match="not finite after 1 tokens"):
        beam_text(of, "a", Beam(width=2))
