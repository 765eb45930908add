"""The slow twin of the feed: the same order written down plainly, token by token, with nothing clever."""

from pathlib import Path

import numpy as np

from megatrain.data import mixture
from megatrain.data.manifest import TRAIN, Manifest
from megatrain.data.order import permutation
from megatrain.data.shards import Shard


class TwinSource:
    """All of a source in lists: `slot_stream(slot)` is what a slot reads, as (document, offset, target, input)."""

    def __init__(self, folder: Path, seed: int, n_slots: int, end: int):
        self.manifest = Manifest.read(folder)
        self.seed, self.n_slots, self.end = seed, n_slots, end
        self.shards = [Shard.of(folder, entry, self.manifest.dtype) for entry in self.manifest.splits[TRAIN].shards]
        self.streams = [[] for _ in range(n_slots)]
        self.epochs = 0

    def epoch(self, number):
        found, print_ = [], self.manifest.fingerprint
        for shard in permutation(len(self.shards), self.seed, "shards", print_, number):
            count = self.shards[shard].entry.documents
            for document in permutation(count, self.seed, "documents", print_, number, int(shard)):
                tokens = self.shards[shard].tokens(document).tolist()
                name = self.shards[shard].document_id(document)
                inputs = [self.end, *tokens[:-1]]
                found += [(name, i, t, x) for i, (t, x) in enumerate(zip(tokens, inputs, strict=True))]
        return found

    def take(self, slot, start, count):
        while len(self.streams[slot]) < start + count:
            stream = self.epoch(self.epochs)
            self.epochs += 1
            for s in range(self.n_slots):
                low, high = s * len(stream) // self.n_slots, (s + 1) * len(stream) // self.n_slots
                part = stream[low:high]
                self.streams[s] += [("border", *part[0]), *[("inside", *x) for x in part[1:]]]
        return self.streams[slot][start : start + count]


def batches(folders, weights, *, seed, n_slots, rows_per_slot, seq_len, end, n):
    """Global batches as lists of rows of (document, offset, target, input, position, number of document)."""
    sources = [TwinSource(Path(folder), seed, n_slots, end) for folder in folders]
    share = mixture.shares(weights)
    credit = mixture.first_credit(share, seed, n_slots, seq_len)
    position = np.zeros((n_slots, len(folders)), dtype=int)
    for _ in range(n):
        rows = [[None] * rows_per_slot for _ in range(n_slots)]
        for turn in range(rows_per_slot):
            picked = mixture.draw(credit, share, seq_len)
            mixture.settle(credit, share, picked, np.full(n_slots, seq_len))
            for slot in range(n_slots):
                source = picked[slot]
                found, number, place = [], -1, 0
                for border, name, offset, target, x in sources[source].take(slot, position[slot, source], seq_len):
                    if not found or offset == 0 or border == "border":
                        number, place = number + 1, 0
                    found.append((name, offset, target, x, place, number))
                    place += 1
                rows[slot][turn] = found
                position[slot, source] += seq_len
        yield [row for slot in rows for row in slot]
