"""A curriculum: row length and weights as functions of the tokens drawn."""

import itertools

import numpy as np
import pytest
import torch

from megatrain.base.errors import ConfigError
from megatrain.config.build import build, plain
from megatrain.config.source import from_plain
from megatrain.data.config import Data, Stage, WeightedSource
from megatrain.data.feed import Feed
from megatrain.data.packing.best_fit import BestFit
from tests.data.corpora import documents, write


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("curriculum")
    return [write(root / "a", documents(200, seed=31)), write(root / "b", documents(200, seed=32))]


STAGES = (
    Stage(after=0, seq_len=16, weights=(1, 1)),
    Stage(after=2048, seq_len=32),
    Stage(after=10_000, weights=(1, 9)),
)


def config(folders, **options):
    sources = tuple(WeightedSource(path=str(f), weight=w) for f, w in zip(folders, (9, 1), strict=True))
    return Data(**({"sources": sources, "seq_len": 64, "workers": 0, "curriculum": STAGES} | options))


def batches(data, n=60, **options):
    with Feed.open(data, **({"seed": 0, "global_batch": 8} | options)) as feed:
        return list(itertools.islice(feed, n))


def test_rows_grow_when_the_tokens_say_so(folders):
    lengths = [batch.tokens.shape[1] for batch in batches(config(folders))]
    drawn = np.cumsum([0, *lengths]) * 8
    assert set(lengths) == {16, 32, 64}
    for n, before in zip(lengths, drawn[:-1], strict=True):
        assert n == (16 if before < 2048 else 32 if before < 10_000 else 64)


def test_weights_change_when_the_tokens_say_so_and_places_are_kept(folders):
    found = batches(config(folders), 200)
    tokens = np.array([np.sum(batch.cursors["tokens"], axis=0) for batch in found])
    drawn = tokens.sum(axis=1)
    first = tokens[np.searchsorted(drawn, 2048)]
    assert abs(first[0] / first.sum() - 0.5) < 0.03
    late = tokens[-1] - tokens[np.searchsorted(drawn, 10_000)]
    assert abs(late[1] / late.sum() - 0.9) < 0.01


def test_a_stop_at_any_stage_changes_no_batch(folders):
    whole = batches(config(folders))
    for start in (5, 20, 40):
        part = batches(config(folders, workers=2), 8, cursors=whole[start - 1].cursors)
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(part, whole[start:], strict=False))


@pytest.mark.parametrize("n_tokens", [1, 2048, 2049, 9_999, 40_000])
def test_steps_are_those_that_draw_the_tokens(folders, n_tokens):
    data = config(folders)
    steps = data.steps(n_tokens, 8)
    drawn = [batch.cursors["drawn"] for batch in batches(data, steps)]
    assert drawn[-1] >= n_tokens
    assert steps == 1 or drawn[-2] < n_tokens


def test_bad_stages_are_refused_together(folders):
    stages = (Stage(after=10, seq_len=65), Stage(after=10, weights=(1,)))
    with pytest.raises(ConfigError) as caught:
        batches(config(folders, curriculum=stages, packing=BestFit()))
    assert len(caught.value.problems) == 4


def test_best_fit_takes_changing_weights(folders):
    stages = (Stage(after=1000, weights=(1, 9)),)
    assert len(batches(config(folders, curriculum=stages, packing=BestFit(window=4)))) == 60


def test_a_run_file_may_hold_all_of_it(folders):
    text = plain(config(folders, packing=BestFit(window=3)))
    text["curriculum"] = [{"after": "2k tokens", "weights": [1, 2.5]}]
    data, _ = build(Data, from_plain(text, "test"))
    assert data.curriculum[0] == Stage(after=2000, weights=(1.0, 2.5))
    assert data.packing == BestFit(window=3)
