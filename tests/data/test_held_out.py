"""The pass over held-out documents."""

from collections import Counter

import pytest
import torch

from megatrain.base.errors import DataError
from megatrain.data.config import Data, WeightedSource
from megatrain.data.feed import held_out
from megatrain.data.held_out import HeldOut
from tests.data.corpora import documents, write


@pytest.fixture(scope="module")
def sizes():
    return [{"n": 30, "seed": 11}, {"n": 9, "seed": 12, "mean": 200}]


@pytest.fixture(scope="module")
def data(tmp_path_factory, sizes):
    root = tmp_path_factory.mktemp("held-out")
    folders = [write(root / str(i), documents(20), documents(**size), per_shard=4) for i, size in enumerate(sizes)]
    sources = tuple(WeightedSource(path=str(f), weight=w) for f, w in zip(folders, (1, 5), strict=True))
    return Data(sources=sources, seq_len=48)


def counted(batches):
    found = Counter()
    for batch in batches:
        found.update(batch.targets[batch.weights == 1].tolist())
    return found


def test_every_held_out_token_is_met_once(data, sizes):
    expected = Counter(token for size in sizes for tokens in documents(**size).values() for token in tokens.tolist())
    assert counted(held_out(data, global_batch=8)) == expected


@pytest.mark.parametrize("dp", [2, 4, 8])
def test_ranks_share_the_rows_and_get_equally_many_batches(data, dp):
    whole = list(held_out(data, global_batch=8))
    parts = [list(held_out(data, global_batch=8, dp_rank=r, dp_size=dp)) for r in range(dp)]
    assert {len(part) for part in parts} == {len(whole)}
    for k, batch in enumerate(whole):
        for name in ("tokens", "targets", "weights", "positions", "documents"):
            assert torch.equal(torch.cat([getattr(part[k], name) for part in parts]), getattr(batch, name))


def test_the_pass_is_cut_short_on_request(data):
    few, whole = list(held_out(data, global_batch=8, n_batches=2)), list(held_out(data, global_batch=8))
    assert len(few) == 2 < len(whole)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(few, whole, strict=False))


def test_sources_come_in_their_shares_while_they_last(data):
    first = [source for source, _ in HeldOut(data).plan()][:12]
    assert first.count(1) == 10


def test_bytes_per_token_are_those_of_the_text(data):
    assert HeldOut(data).bytes_per_token == 4  # as the data sets were written


def test_no_held_out_documents_are_refused(tmp_path):
    data = Data(sources=(WeightedSource(path=str(write(tmp_path / "a", documents(20)))),), seq_len=48)
    with pytest.raises(DataError, match="nothing in its held_out split"):
        next(held_out(data, global_batch=8))
