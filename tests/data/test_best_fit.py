"""Best-fit packing: whole documents, little padding, the same rows for any ranks and wherever a run was stopped."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.base.errors import ConfigError, DataError
from megatrain.data.config import Data, WeightedSource
from megatrain.data.corpus import Stretch
from megatrain.data.feed import Feed
from megatrain.data.packing.best_fit import BestFit, best_fit
from megatrain.data.rows import empty, pieces
from megatrain.data.stream import Order, Stream
from tests.data.corpora import END, documents, write


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("best-fit")
    return [write(root / "a", documents(400, seed=21, mean=40)), write(root / "b", documents(90, seed=22, mean=150))]


def config(folders, weights=(3, 1), window=16, **options):
    sources = tuple(WeightedSource(path=str(f), weight=w) for f, w in zip(folders, weights, strict=False))
    return Data(**({"sources": sources, "seq_len": 128, "workers": 0, "packing": BestFit(window=window)} | options))


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 128))
def test_rows_hold_every_token_once_and_never_too_many(lengths, seq_len):
    ends = list(itertools.accumulate(lengths))
    whole = [Stretch(None, end - n, end) for end, n in zip(ends, lengths, strict=True)]
    rows = best_fit(whole, seq_len)
    assert all(sum(s.stop - s.start for s in row) <= seq_len for row in rows)
    assert sorted(t for row in rows for s in row for t in range(s.start, s.stop)) == list(range(sum(lengths)))
    cut = [n for n in lengths if n > seq_len]
    assert sum(map(len, rows)) == len(lengths) - len(cut) + sum(-(-n // seq_len) for n in cut)


@settings(max_examples=50)
@given(st.lists(st.integers(1, 50), max_size=40))
def test_each_piece_goes_where_it_leaves_the_least_room(lengths):
    """The slow twin looks at every row."""
    whole = [Stretch(i, 0, n) for i, n in enumerate(lengths)]
    room = []
    for n in sorted(lengths, reverse=True):
        fitting = [i for i, left in enumerate(room) if left >= n]
        if fitting:
            room[min(fitting, key=lambda i: (room[i], i))] -= n
        else:
            room.append(50 - n)
    found = [50 - sum(s.stop - s.start for s in row) for row in best_fit(whole, 50)]
    assert found == room


def test_a_batch_holds_whole_documents_and_padding_that_does_not_count(folders):
    stream = Stream(Order(config(folders), 0, 8))
    for _ in range(10):
        arrays = empty(8, 128)
        _, rows = stream.fill(arrays)
        counted = np.zeros((8, 128))
        for piece in pieces(rows):
            span = slice(piece.column, piece.column + piece.n_tokens)
            counted[piece.row, span] = 1
            assert arrays["positions"][piece.row, span].tolist() == list(range(piece.n_tokens))
            assert len(set(arrays["documents"][piece.row, span].tolist())) == 1
            assert piece.offset % 128 == 0
            if piece.n_tokens < 128:
                assert arrays["targets"][piece.row, span][-1] == END
        assert (arrays["weights"] == counted).all()


def test_every_document_is_used_once_per_epoch_over_all_slots(folders):
    expected = Counter(token for tokens in documents(400, seed=21, mean=40).values() for token in tokens.tolist())
    stream = Stream(Order(config(folders[:1], (1,), slots=6), 3, 6))
    parts = [stream.corpora[0].part(slot, 6) for slot in range(6)]
    found = Counter()
    while any(stream.slots.tokens[slot, 0] < high - low for slot, (low, high) in enumerate(parts)):
        first = [stream.slots.tokens[slot, 0] < high - low for slot, (low, high) in enumerate(parts)]
        arrays = empty(6, 128)
        stream.fill(arrays)
        for slot in range(6):
            if first[slot]:
                found.update(arrays["targets"][slot][arrays["weights"][slot] == 1].tolist())
    assert found == expected


def test_little_is_padded(folders):
    batches = list(itertools.islice(Feed.open(config(folders, window=64), seed=0, global_batch=4), 100))
    assert torch.stack([batch.weights.mean() for batch in batches]).mean() > 0.95


def test_shares_are_exact_in_tokens_that_count(folders):
    stream = Stream(Order(config(folders), 0, 8))
    tokens = np.zeros(2)
    for _ in range(300):
        _, rows = stream.fill(empty(8, 128))
        for piece in pieces(rows):
            tokens[int("/b/" in piece.tar)] += piece.n_tokens
    assert abs(tokens[1] / tokens.sum() - 0.25) < 0.005


@pytest.mark.parametrize("dp", [2, 4])
def test_ranks_workers_and_stops_change_no_batch(folders, dp):
    data = config(folders, window=4)
    whole = list(itertools.islice(Feed.open(data, seed=1, global_batch=8), 60))
    for start in (0, 17, 44):
        cursors = whole[start - 1].cursors if start else None
        feeds = [
            Feed.open(
                config(folders, window=4, workers=int(r == 0)),
                seed=1, global_batch=8, dp_rank=r, dp_size=dp, cursors=cursors,
            )
            for r in range(dp)
        ]  # fmt: skip
        for expected in whole[start : start + 15]:
            parts = [next(feed) for feed in feeds]
            assert torch.equal(torch.cat([p.tokens for p in parts]), expected.tokens)
            assert torch.equal(torch.cat([p.weights for p in parts]), expected.weights)
            assert all(p.cursors == expected.cursors for p in parts)
        for feed in feeds:
            feed.close()


def test_a_window_must_hold_something(folders):
    with pytest.raises(ConfigError, match="window is 0"):
        Feed.open(config(folders, window=0), seed=0, global_batch=4)


def test_more_slots_than_documents_are_refused(tmp_path):
    one = write(tmp_path / "one", {"d": np.append(np.arange(1, 5000), END)})
    with pytest.raises(DataError, match=r"no document of .*/one begins in the part of slot 1"):
        next(Feed.open(config([one], (1,)), seed=0, global_batch=4))
