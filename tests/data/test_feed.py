"""The feed: one order for every number of ranks and workers, wherever a run was stopped."""

import hashlib
import itertools
import json
import logging
import os
import random
import signal
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatrain.base.errors import ConfigError, DataError, RunError
from megatrain.data import worker
from megatrain.data.config import Data, WeightedSource
from megatrain.data.feed import Feed
from megatrain.data.rows import empty, pieces
from megatrain.data.shards import Shard
from megatrain.data.stream import Order, Stream
from tests.data import twin
from tests.data.corpora import END, documents, write

N_SLOTS = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpora")
    return [
        write(root / "books", documents(300, seed=1)),
        write(root / "web", documents(700, seed=2, mean=25)),
        write(root / "code", documents(60, seed=3, mean=300), per_shard=7),
    ]


def config(folders, weights=None, **options):
    weights = weights or [1.0] * len(folders)
    sources = tuple(WeightedSource(path=str(f), weight=w) for f, w in zip(folders, weights, strict=True))
    return Data(**({"sources": sources, "seq_len": 64, "workers": 0} | options))


@pytest.fixture(scope="module")
def mixed(folders):
    return config(folders, [5, 3, 2])


def digest(tokens):
    return hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()


def global_digests(data, n, cursors=None, dp=1, workers=None, **options):
    """Digests of `n` global batches and the cursors after each, as dp ranks read them; `workers` by rank."""
    options = {"seed": 7, "global_batch": N_SLOTS} | options
    feeds = [
        Feed.open(replace(data, workers=w), dp_rank=r, dp_size=dp, cursors=cursors, **options)
        for r, w in enumerate(workers or [0] * dp)
    ]
    found = []
    for _ in range(n):
        batches = [next(feed) for feed in feeds]
        assert all(batch.cursors == batches[0].cursors for batch in batches)
        found.append((digest(torch.cat([batch.tokens for batch in batches])), batches[0].cursors))
    for feed in feeds:
        feed.close()
    return found


@pytest.fixture(scope="module")
def expected(mixed):
    return [d for d, _ in global_digests(mixed, 201)]


@pytest.mark.parametrize("dp", [2, 3, 4, 6, 8])
def test_changing_dp_keeps_every_batch(mixed, expected, dp):
    assert [d for d, _ in global_digests(mixed, 201, dp=dp)] == expected


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_changing_the_number_of_workers_keeps_every_batch(mixed, expected, workers):
    assert [d for d, _ in global_digests(mixed, 201, dp=2, workers=[workers, 0])] == expected


def test_a_run_that_is_killed_30_times_on_changing_ranks_and_workers_sees_every_batch_once(mixed, expected):
    rng = random.Random(5)
    stops = [0, *sorted(rng.sample(range(1, 201), 30)), 201]
    found, cursors = [], None
    for start, stop in itertools.pairwise(stops):
        dp = rng.choice([1, 2, 3, 4, 6, 8])
        workers = [rng.choice([0, 0, 0, 1, 2, 3])] + [0] * (dp - 1)
        part = global_digests(mixed, stop - start, cursors, dp, workers)
        found += [d for d, _ in part]
        cursors = json.loads(json.dumps(part[-1][1]))  # as a checkpoint keeps it
    assert found == expected


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    weights=st.lists(st.floats(0.05, 1), min_size=3, max_size=3),
    seed=st.integers(0, 2**40),
    per_slot=st.integers(1, 3),
    n_slots=st.sampled_from([1, 2, 5, 8]),
    seq_len=st.sampled_from([1, 7, 64, 200]),
)
def test_batches_are_those_of_the_slow_twin(folders, weights, seed, per_slot, n_slots, seq_len):
    data = config(folders, weights, seq_len=seq_len, slots=n_slots)
    feed = Feed.open(data, seed=seed, global_batch=n_slots * per_slot)
    slow = twin.batches(
        folders, weights, seed=seed, n_slots=n_slots, rows_per_slot=per_slot, seq_len=seq_len, end=END, n=12
    )
    for batch, rows in zip(feed, slow, strict=False):
        for i, tensor in ((2, batch.targets), (3, batch.tokens), (4, batch.positions), (5, batch.documents)):
            assert tensor.tolist() == [[token[i] for token in row] for row in rows]
        assert batch.most_documents == 1 + max(row[-1][5] for row in rows)
        assert (batch.weights == 1).all()


@pytest.mark.parametrize("n_slots", [1, 5, 24])
def test_every_token_of_a_source_is_used_once_per_epoch_over_all_slots_of_a_mixture(folders, n_slots):
    read = [[[] for _ in range(n_slots)] for _ in folders]  # targets by source and slot
    before = np.zeros((n_slots, len(folders)), dtype=int)
    feed = Feed.open(config(folders, [5, 3, 2], slots=n_slots), seed=7, global_batch=n_slots)
    for batch in itertools.islice(feed, 120_000 // (64 * n_slots)):
        now = np.array(batch.cursors["tokens"])
        for slot, source in np.argwhere(now != before):
            read[source][slot] += batch.targets[slot].tolist()
        before = now
    for folder, slots in zip(folders, read, strict=True):
        source = twin.TwinSource(folder, 7, n_slots, END)
        stored = Counter(target for _, _, target, _ in source.epoch(0))
        ends = np.arange(n_slots + 1) * stored.total() // n_slots
        sizes = np.diff(ends)
        n_epochs = min(len(stream) // size for stream, size in zip(slots, sizes, strict=True))
        assert n_epochs >= 1
        for epoch in range(n_epochs):
            parts = [stream[epoch * size :][:size] for stream, size in zip(slots, sizes, strict=True)]
            assert Counter(itertools.chain(*parts)) == stored


def test_without_masks_positions_run_on(folders):
    masked, plain = (
        next(Feed.open(config(folders, mask_documents=mask), seed=0, global_batch=4)) for mask in (True, False)
    )
    assert plain.positions.tolist() == [list(range(64))] * 4
    assert not plain.documents.any()
    assert plain.most_documents == 1
    assert plain.tokens.tolist() == masked.tokens.tolist()
    assert masked.most_documents > 1


def test_rows_of_one_document_each_are_not_packed(tmp_path):
    same = {f"{i}": np.append(np.full(31, 5 + i), END) for i in range(16)}
    batch = next(Feed.open(config([write(tmp_path / "a", same)], seq_len=32), seed=0, global_batch=4))
    assert batch.most_documents == 1
    assert not batch.documents.any()
    assert batch.tokens[:, 0].tolist() == [END] * 4
    assert batch.targets[:, -1].tolist() == [END] * 4


def test_seek_goes_back_to_any_batch(mixed):
    with Feed.open(mixed, seed=7, global_batch=N_SLOTS) as feed:
        batches = list(itertools.islice(feed, 6))
        feed.seek(batches[2].cursors)
        assert feed.batches == 3
        assert torch.equal(next(feed).tokens, batches[3].tokens)
        feed.seek(None)
        assert torch.equal(next(feed).tokens, batches[0].tokens)


# ------------------------------------------------------------------------------------------------ sources change


def test_sources_may_be_added_removed_reweighted_and_moved_and_keep_their_places(folders, tmp_path):
    books, web, code = folders
    start = list(itertools.islice(Feed.open(config([books, web], [1, 1]), seed=0, global_batch=8), 10))[-1].cursors
    moved = tmp_path / "moved"
    moved.symlink_to(web)
    data = config([code, moved], [1, 3])
    batch = next(Feed.open(data, seed=0, global_batch=8, cursors=start))
    tokens = np.array(batch.cursors["tokens"])
    assert (tokens[:, 0] <= 64).all()
    before = np.array(start["tokens"])[:, 1]
    assert ((tokens[:, 1] == before) | (tokens[:, 1] == before + 64)).all()


def test_a_source_that_was_replaced_by_other_content_is_refused(tmp_path):
    folder = write(tmp_path / "a", documents(50, seed=1))
    cursors = next(Feed.open(config([folder]), seed=0, global_batch=4)).cursors
    write(folder, documents(50, seed=2))
    with pytest.raises(DataError, match="has changed"):
        Feed.open(config([folder]), seed=0, global_batch=4, cursors=cursors)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"seed": 1}, "set seed: 0"), ({"global_batch": 8}, "set data.slots: 4"), ({"version": 9}, "version 9")],
)
def test_cursors_of_another_order_are_refused(folders, change, message):
    options = {"seed": 0, "global_batch": 4}
    cursors = next(Feed.open(config(folders), **options)).cursors
    if "version" in change:
        cursors, change = cursors | change, {}
    with pytest.raises(DataError, match=message):
        Feed.open(config(folders), **(options | change), cursors=cursors)


def test_the_global_batch_may_grow_over_the_same_slots(folders):
    small = Feed.open(config(folders, slots=4), seed=0, global_batch=4)
    cursors = next(small).cursors
    large = next(Feed.open(config(folders, slots=4), seed=0, global_batch=8, cursors=cursors))
    rows = [next(small).tokens, next(small).tokens]
    assert torch.equal(large.tokens.view(4, 2, -1), torch.stack(rows, dim=1))


# ------------------------------------------------------------------------------------------------ bad input


def test_what_does_not_go_together_is_refused_all_at_once(folders):
    with pytest.raises(ConfigError) as caught:
        Feed.open(config(folders, slots=5, seq_len=0), seed=0, global_batch=12, dp_size=2)
    assert len(caught.value.problems) == 3
    assert "train.global_batch=12 is no multiple of data.slots=5" in str(caught.value)
    assert "use one of [1, 5] ranks" in str(caught.value)


def test_sources_of_different_tokenizers_are_refused(folders, tmp_path):
    other = write(tmp_path / "other", documents(50, seed=9), fingerprint="e" * 64)
    with pytest.raises(DataError, match="different tokenizers"):
        Feed.open(config([folders[0], other]), seed=0, global_batch=4)


def test_the_same_data_set_twice_is_refused(folders, tmp_path):
    (tmp_path / "again").symlink_to(folders[0])
    with pytest.raises(DataError, match="the same data set"):
        Feed.open(config([folders[0], tmp_path / "again"]), seed=0, global_batch=4)


def test_a_split_too_small_for_a_batch_is_refused(tmp_path):
    folder = write(tmp_path / "a", documents(5))
    with pytest.raises(DataError, match=r"has \d+ tokens and one batch takes 65536"):
        Feed.open(config([folder], seq_len=1024), seed=0, global_batch=64)
    with pytest.raises(DataError, match="nothing in its held_out split"):
        Feed.open(config([folder]), seed=0, global_batch=1, split="held_out")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_id_beyond_the_vocabulary_is_refused_at_its_document(tmp_path, workers):
    found = documents(50)
    found["d0/17"][0] = 60_123
    folder = write(tmp_path / "a", found)
    message = r"token id 60123 in document 'd0/17' of .*shard-000000.tar is not below the vocabulary's 60000"
    with (
        Feed.open(config([folder], workers=workers), seed=0, global_batch=4) as feed,
        pytest.raises(DataError, match=message),
    ):
        list(itertools.islice(feed, 50))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_shard_is_refused_by_name(tmp_path, workers):
    folder = write(tmp_path / "a", documents(50))
    (folder / "train/shard-000000.tar").unlink()
    with (
        Feed.open(config([folder], workers=workers), seed=0, global_batch=4) as feed,
        pytest.raises(DataError, match=r"shard-000000\.tar is damaged .*is missing"),
    ):
        next(feed)


# ------------------------------------------------------------------------------------------------ workers


def test_the_death_of_a_worker_is_reported_as_such(mixed):
    with Feed.open(replace(mixed, workers=2), seed=7, global_batch=N_SLOTS) as feed:
        next(feed)
        os.kill(feed.worker_pids[1], signal.SIGKILL)
        with pytest.raises(RunError, match=r"data worker 1 .* was killed by signal SIGKILL; .*out of memory"):
            list(itertools.islice(feed, 20))


def test_workers_end_with_their_feed_and_ignore_the_signals_of_the_trainer(mixed):
    with Feed.open(replace(mixed, workers=1), seed=7, global_batch=N_SLOTS) as feed:
        next(feed)
        (pid,) = feed.worker_pids
        os.kill(pid, signal.SIGTERM)
        list(itertools.islice(feed, 20))
        assert os.getpgid(pid) != os.getpgid(0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_worker_that_hangs_is_told_of_and_waited_for(folders, monkeypatch, caplog):
    monkeypatch.setattr(worker, "_PATIENCE", 0.05)
    with Feed.open(config(folders, workers=1), seed=0, global_batch=N_SLOTS) as feed:
        expected = [next(feed).tokens for _ in range(worker.N_BUFFERS + 3)]
    with Feed.open(config(folders, workers=1), seed=0, global_batch=N_SLOTS) as feed:
        (pid,) = feed.worker_pids

        class WakesIt(logging.Handler):
            def emit(self, record):
                if "has delivered nothing" in record.getMessage():
                    told.append(record)
                    os.kill(pid, signal.SIGCONT)

        told, handler = [], WakesIt()
        found = [next(feed).tokens]
        os.kill(pid, signal.SIGSTOP)
        logging.getLogger("megatrain").addHandler(handler)
        try:
            found += [next(feed).tokens for _ in range(worker.N_BUFFERS + 2)]
        finally:
            logging.getLogger("megatrain").removeHandler(handler)
    assert told
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("batches", [0, 40, 4000, 400_000])
def test_a_resume_touches_what_its_first_batch_holds_wherever_it_is(folders, monkeypatch, batches):
    stream = Stream(Order(config(folders), 0, N_SLOTS))
    stream.slots.tokens += 64 * batches // 3  # as if the sources had taken turns
    stream.slots.batches = batches
    cursors = stream.cursors()
    opened, checked = [], []
    column, damaged = Shard.column, Shard.damaged
    monkeypatch.setattr(Shard, "column", lambda self, name: opened.append((self.name, name)) or column(self, name))
    monkeypatch.setattr(Shard, "damaged", lambda self, number: checked.append(number) or damaged(self, number))
    resumed = Stream(Order(config(folders), 0, N_SLOTS), cursors)
    _, rows = resumed.fill(empty(*resumed.shape))
    assert len(checked) <= len(list(pieces(rows)))
    assert len({name for name, _ in opened}) <= 2 * N_SLOTS
    assert len(opened) == len(set(opened))  # each column of an index once
