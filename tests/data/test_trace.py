"""The trace of a run's data."""

import hashlib
from collections import Counter

import numpy as np
import pytest
import torch

from megatrain.data.config import Data, WeightedSource
from megatrain.data.feed import Feed
from megatrain.data.trace import trace
from tests.data.corpora import END, documents, write

LENGTHS = [len(tokens) for tokens in documents(80, seed=1).values()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Document i repeats token i + 1, so that tokens tell their document."""
    root = tmp_path_factory.mktemp("trace")
    found = {f"b/{i}": np.append(np.full(n - 1, i + 1), END) for i, n in enumerate(LENGTHS)}
    sources = (WeightedSource(path=str(write(root / "b", found))),)
    return Data(sources=sources, seq_len=64, workers=0)


def test_the_digest_is_that_of_the_tokens_of_the_global_batch(data):
    lines = list(trace(data, seed=3, global_batch=4, start=0, stop=5, dp=2))
    for line, batch in zip(lines, Feed.open(data, seed=3, global_batch=4), strict=False):
        assert line["sha256"] == hashlib.sha256(batch.tokens.to(torch.int64).numpy().tobytes()).hexdigest()
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]


def test_a_trace_may_begin_anywhere(data):
    whole = list(trace(data, seed=3, global_batch=4, start=0, stop=12))
    assert list(trace(data, seed=3, global_batch=4, start=7, stop=12, dp=4)) == whole[7:]


def test_documents_are_those_of_the_tokens_in_order_of_appearance(data):
    line = next(trace(data, seed=3, global_batch=4, start=2, stop=3))
    stream = Feed.open(data, seed=3, global_batch=4)
    for _ in range(3):
        batch = next(stream)
    appeared = dict.fromkeys(f"b/{t - 1}" for t in batch.targets.flatten().tolist() if t != END)
    assert list(dict.fromkeys(line["documents"])) == list(appeared)
    assert set(line["begun"]) <= set(line["documents"])


def test_every_document_begins_once_per_epoch(data):
    n = sum(LENGTHS) // (4 * 64)
    begun = Counter(d for line in trace(data, seed=3, global_batch=4, start=0, stop=n + 1) for d in line["begun"])
    last = next(trace(data, seed=3, global_batch=4, start=n, stop=n + 1))["begun"]
    assert set(begun) == {f"b/{i}" for i in range(80)}
    assert {d for d, count in begun.items() if count > 1} <= set(last)
