"""Objectives: what is predicted of a document, the same for any ranks and workers."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatrain.base.errors import ConfigError
from megatrain.data.config import Data, WeightedSource
from megatrain.data.feed import Feed
from megatrain.data.objective.fill_in_the_middle import FillInTheMiddle
from megatrain.data.objective.span_corruption import SpanCorruption, SpanRewriter
from megatrain.data.packing.best_fit import BestFit
from tests.data.corpora import END, documents, write

PREFIX, SUFFIX, MIDDLE = 59_001, 59_002, 59_003
SENTINELS = tuple(range(59_100, 59_150))
FIM = FillInTheMiddle(rate=1, prefix=PREFIX, suffix=SUFFIX, middle=MIDDLE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = {name: tokens % 50_000 for name, tokens in documents(150, seed=41).items()}
    return write(tmp_path_factory.mktemp("objective") / "a", found)


def batches(folder, n=20, seed=0, global_batch=8, dp_rank=0, dp_size=1, cursors=None, **options):
    options = {"sources": (WeightedSource(path=str(folder)),), "seq_len": 128, "workers": 0} | options
    ranks = {"dp_rank": dp_rank, "dp_size": dp_size, "cursors": cursors}
    with Feed.open(Data(**options), seed=seed, global_batch=global_batch, **ranks) as feed:
        return list(itertools.islice(feed, n))


def documents_of(batch):
    """(inputs, targets, weights) of each document of each row."""
    for row in range(batch.rows):
        for number in range(int(batch.documents[row].max()) + 1):
            where = batch.documents[row] == number
            yield tuple(getattr(batch, name)[row][where].tolist() for name in ("tokens", "targets", "weights"))


def undo_fim(targets, suffix_first):
    """The document that was rewritten, without its last three tokens; and what ends it."""
    p, s, m = (targets.index(token) for token in (PREFIX, SUFFIX, MIDDLE))
    end = targets[-1:] if targets[-1] == END else []
    inner = targets[: len(targets) - len(end)]
    assert not suffix_first or s == p + 1
    return inner[p + 1 : s] + inner[m + 1 :] + inner[s + 1 : m], end


@pytest.mark.parametrize("spm_rate", [0.0, 1.0])
def test_a_gap_is_filled_from_the_same_document(folder, spm_rate):
    objective = FillInTheMiddle(rate=1, spm_rate=spm_rate, prefix=PREFIX, suffix=SUFFIX, middle=MIDDLE)
    plain, rewritten = batches(folder), batches(folder, objective=objective)
    for before, after in zip(plain, rewritten, strict=True):
        assert torch.equal(before.documents, after.documents)
        for (_, old, _), (inputs, new, _) in zip(documents_of(before), documents_of(after), strict=True):
            assert inputs[1:] == new[:-1]
            body = old[:-1] if old[-1] == END else old
            if len(body) < 8:
                assert new == old
                continue
            assert new[0] == PREFIX
            assert inputs[0] == END
            told, end = undo_fim(new, spm_rate == 1)
            assert told == body[:-3]
            assert old[len(body) :] == end


def test_the_rate_is_the_share_of_rewritten_documents(folder):
    objective = FillInTheMiddle(rate=0.3, prefix=PREFIX, suffix=SUFFIX, middle=MIDDLE)
    found = [new[0] == PREFIX for b in batches(folder, 100, objective=objective) for _, new, _ in documents_of(b)]
    assert abs(np.mean(found) - 0.3) < 0.06


@given(
    st.integers(8, 300), st.integers(0, 2**32), st.floats(0.05, 0.5), st.floats(1, 8), st.integers(1, len(SENTINELS))
)
def test_spans_and_sentinels_give_the_document_back(n, seed, density, span, n_sentinels):
    config = SpanCorruption(sentinels=SENTINELS[:n_sentinels], density=density, span=span)
    body = np.arange(1, n + 1)
    targets, weights = SpanRewriter(config, np.array(config.sentinels)).corrupt(body, seed)
    assert len(targets) == len(weights) == n
    told = targets[weights == 1].tolist()
    read = targets[weights == 0].tolist()
    spans = {}
    for token in told:
        if token in SENTINELS:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    assert all(spans.values())
    found = [t for token in read for t in (spans[token] if token in SENTINELS else [token])]
    assert found == body[: len(found)].tolist()
    assert len(found) + 2 * len(spans) == n


def test_only_spans_count_in_the_loss(folder):
    for batch in batches(folder, 3, objective=SpanCorruption(sentinels=SENTINELS)):
        for _, targets, weights in documents_of(batch):
            if len(targets) > 20:
                first = next(i for i, w in enumerate(weights) if w)
                assert targets[first] == SENTINELS[0]
                assert set(weights[:first]) == {0}
                assert set(weights[first:]) == {1}


@pytest.mark.parametrize("objective", [FIM, SpanCorruption(sentinels=SENTINELS, rate=0.5)])
@pytest.mark.parametrize("packing", [{}, {"packing": BestFit(window=4)}])
def test_ranks_workers_and_stops_change_no_batch(folder, objective, packing):
    whole = batches(folder, 12, objective=objective, **packing)
    cursors = whole[4].cursors
    parts = [
        batches(folder, 7, dp_rank=r, dp_size=2, cursors=cursors, objective=objective, workers=r, **packing)
        for r in (0, 1)
    ]
    for k, expected in enumerate(whole[5:]):
        for name in ("tokens", "targets", "weights", "documents"):
            assert torch.equal(torch.cat([getattr(part[k], name) for part in parts]), getattr(expected, name))


def test_tokens_are_named_or_given_by_id(folder, tmp_path):
    named = tmp_path / "named"
    named.symlink_to(folder)
    tokens = [
        {"content": "<pre>", "id": PREFIX},
        {"content": "<suf>", "id": SUFFIX},
        {"content": "<mid>", "id": MIDDLE},
    ]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    by_name = FillInTheMiddle(rate=1, prefix="<pre>", suffix="<suf>", middle="<mid>")
    assert torch.equal(batches(named, 1, objective=by_name)[0].tokens, batches(folder, 1, objective=FIM)[0].tokens)
    with pytest.raises(ConfigError, match=r"no special token '<per>': did you mean <pre>\?"):
        batches(folder, 1, objective=FillInTheMiddle(prefix="<per>", suffix="<suf>", middle="<mid>"))


def test_bad_rates_are_refused(folder):
    with pytest.raises(ConfigError) as caught:
        batches(folder, objective=FillInTheMiddle(rate=2, spm_rate=-1, prefix=1, suffix=2, middle=3))
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError) as caught:
        batches(folder, objective=SpanCorruption(sentinels=(), density=1, span=0))
    assert len(caught.value.problems) == 3
