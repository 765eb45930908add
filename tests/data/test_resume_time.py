"""How long a resume takes in the middle of a gigabyte."""

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatrain.data.cache import Cache
from megatrain.data.config import Data, WeightedSource
from megatrain.data.manifest import TRAIN, Manifest, Split, TokenizerEntry
from megatrain.data.rows import empty
from megatrain.data.shards import ShardWriter
from megatrain.data.stream import Order, Stream
from tests.data.corpora import VOCAB
from tests.servers import Server

ROWS, SEQ_LEN = 32, 2048


def gigabyte(folder: Path) -> Path:
    """0.5 billion tokens in 360,000 documents and eight shards."""
    rng, entries = np.random.default_rng(0), []
    tokens = rng.integers(1, VOCAB, 2**22).astype(np.uint16)
    for number in range(8):
        with ShardWriter(folder, TRAIN, number, "uint16") as writer:
            for i, length in enumerate(np.minimum(1 + rng.geometric(1 / 1000, size=45_000), 2**20).tolist()):
                begin = (i * 7919 + number) % (2**22 - 2**20)
                writer.write(f"d{number}/{i}", tokens[begin : begin + length], 4 * length)
        entries.append(writer.entry)
    Manifest("gigabyte", TokenizerEntry("0" * 64, VOCAB, 0), "uint16", {TRAIN: Split(tuple(entries))}).write(folder)
    assert sum(entry.bytes for entry in entries) > 0.99e9
    return folder


def middle(order: Order) -> dict[str, Any]:
    stream = Stream(order)
    share = stream.corpora[0].size // ROWS // 2 // SEQ_LEN
    stream.slots.tokens += share * SEQ_LEN
    stream.slots.batches = share
    return stream.cursors()


def seconds(order: Order, cursors: dict[str, Any] | None) -> float:
    """From a batch's cursors to the rows of the next batch."""
    began = time.perf_counter()
    stream = Stream(order, cursors)
    stream.fill(empty(*stream.shape))
    return time.perf_counter() - began


@pytest.mark.slow
def test_a_resume_in_the_middle_of_a_gigabyte_takes_a_twentieth_of_a_second_on_disk_and_under_one_over_http(tmp_path):
    folder = gigabyte(tmp_path / "set")
    order = Order(Data(sources=(WeightedSource(path=str(folder)),), seq_len=SEQ_LEN, workers=0), 0, ROWS)
    half = middle(order)
    taken = [(seconds(order, None), seconds(order, half)) for _ in range(9)]
    start, there = (min(one) for one in zip(*taken, strict=True))

    far = []
    with Server(folder) as server:
        for i in range(3):
            cache = Cache(dir=str(tmp_path / f"cache{i}"))  # cold: nothing of the data set is on this machine
            data = Data(sources=(WeightedSource(path=server.address),), seq_len=SEQ_LEN, workers=0, cache=cache)
            far.append(seconds(Order(data, 0, ROWS), half))
    print(f"resume: at the start {start:.4f} s, in the middle {there:.4f} s, over HTTP {statistics.median(far):.3f} s")
    assert there < 0.05
    assert there < 1.5 * start
    assert min(far) < 1
