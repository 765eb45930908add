"""A source as one long stream of tokens per epoch, which any slot can enter at any position.

In each epoch the shards stand in one seeded order and the documents of each shard in another. Laid end to end they make
a stream of exactly as many tokens as the split has. Slot s of S reads its S-th part of every epoch, so that:

- over all slots each token of a source is used exactly once per epoch of the source;
- where a slot stands is one number, the tokens it has read: epoch, shard, document and offset follow by arithmetic from
  the manifest and the index of one shard, at the same cost everywhere in the stream;
- a rank touches only the shards that its own slots read.

A document that lies across the border of two slots' parts is read by both, each its own part of the tokens.
"""

import json
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatrain.base.errors import DataError
from megatrain.data.cache import Cache
from megatrain.data.hedge import Hedged
from megatrain.data.manifest import MANIFEST, Manifest, ShardEntry, TokenizerEntry, check_paths
from megatrain.data.order import permutation
from megatrain.data.remote import RemoteShard
from megatrain.data.shards import Shard
from megatrain.data.store import Store, is_remote, open_store, read_whole, redacted

_FEW = 6  # documents that are copied faster one by one than gathered
_READERS = 4096  # places that a shard remembers
_EPOCHS = 100  # that may pass without a document in the part of a slot
_OPEN_SHARDS = 512  # shuffled shards kept at once, at 24 bytes a document


class Stretch(NamedTuple):
    """Tokens [start, stop) of one shuffled shard."""

    shard: "ShuffledShard"
    start: int
    stop: int


class Entered(NamedTuple):
    """The document that a reader is in: place in the order, positions [begin, end), from a position to an element."""

    place: int
    begin: int
    end: int
    shift: int
    sound: bool
    """Its bytes are those that were written."""


class ShuffledShard:
    """The documents of a shard in the order of one epoch, laid end to end. Positions are in that stream of tokens."""

    def __init__(self, shard: Shard, order: NDArray[np.int64]):
        self.shard = shard
        self.order = order
        length = shard.length[order]  # tokens; bytes where documents are raw text
        self.end = np.cumsum(length)
        self.begin = self.end - length
        self.shift = shard.start[order] - self.begin  # from a position to an element of the tar
        self._sound = bytearray(len(order))  # 1 where a document was checked and is as it was written
        self._readers: dict[int, Entered] = {}  # where readers will go on, and the document there

    def enter(self, start: int, stop: int) -> Entered:
        """The document at `start`, for who reads to `stop` and will go on from there.

        Most rows of long documents lie within one that was entered before, and cost a look into a table.
        """
        known = self._readers.pop(start, None)
        if known is None:
            if len(self._readers) > _READERS:  # of readers that went elsewhere
                self._readers.clear()
            place = int(self.end.searchsorted(start, side="right"))
            begin, end, shift = int(self.begin[place]), int(self.end[place]), int(self.shift[place])
            known = Entered(place, begin, end, shift, self.damaged(place, place + 1) is None)
        if stop < known.end:
            self._readers[stop] = known
        return known

    def ends(self, first: int, stop: int) -> tuple[int, list[int]]:
        """Of the documents from place `first` to position `stop`: the place after them, and where each ends."""
        near = self.end[first : first + _FEW].tolist()
        if near[-1] >= stop:
            last = first + bisect_left(near, stop) + 1
            ends = near[: last - first]
        else:
            last = int(self.begin.searchsorted(stop, side="left"))
            ends = self.end[first:last].tolist()
        return last, ends

    def go_on(self, place: int, stop: int) -> None:
        """A reader has come to `stop`, inside the document at `place`, which was checked."""
        begin, end, shift = int(self.begin[place]), int(self.end[place]), int(self.shift[place])
        self._readers[stop] = Entered(place, begin, end, shift, self._sound[place] == 1)

    def damaged(self, first: int, last: int) -> list[bool] | None:
        """Which of the documents [first, last) are not as they were written; None where all are sound."""
        if self._sound.count(1, first, last) == last - first:
            return None
        found = self.shard.damaged_among(self.order[first:last].tolist())
        self._sound[first:last] = bytes(not bad for bad in found)
        return found if any(found) else None

    def lengths(self, first: int, last: int, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens of each of those documents within [start, stop)."""
        length = self.end[first:last] - self.begin[first:last]
        length[0] -= start - self.begin[first]
        length[-1] -= self.end[last - 1] - stop
        return length

    def copy(self, into: NDArray[np.int64], first: int, ends: list[int], start: int, stop: int) -> None:
        """Write the ids at [start, stop) to `into` [stop - start]: of documents from place `first` on, with `ends`."""
        ids, last = self.shard.ids, first + len(ends)
        if len(ends) > _FEW:
            where = np.repeat(self.shift[first:last], self.lengths(first, last, start, stop))
            where += np.arange(start, stop)
            into[:] = ids.take(where)
            return
        at = start
        for shift, end in zip(self.shift[first:last].tolist(), ends, strict=True):
            upto = min(end, stop)
            into[at - start : upto - start] = ids[at + shift : upto + shift]
            at = upto

    def before(self, first: int, start: int) -> int:
        """The id before position `start`, which lies inside document `first`."""
        return int(self.shard.ids[start + self.shift[first] - 1])


@dataclass(frozen=True)
class Access:
    """What is needed to read a data set beside its address."""

    cache: Cache = field(default_factory=Cache)
    allow_pipe: bool = False

    def store(self, address: str) -> Store | None:
        """Who reads it; None for a folder of this machine."""
        return Hedged(open_store(address, self.allow_pipe)) if is_remote(address) else None


class Corpus:
    """One split of a data set, in the order that a seed gives it."""

    def __init__(
        self,
        address: str,
        split: str,
        seed: int,
        cache: Cache | None = None,
        allow_pipe: bool = False,
        manifest: Manifest | None = None,
    ):
        """Opens the manifest, which is read unless it is given, and no shard."""
        self.name, self.seed = redacted(address), seed
        store = Access(cache or Cache(), allow_pipe).store(address)
        self.manifest = manifest or read_manifest(address, store)
        self._store, self._address = store, address
        self.fingerprint = self.manifest.fingerprint
        if split not in self.manifest.splits or not self.manifest.splits[split].size:
            full = [name for name, s in self.manifest.splits.items() if s.size]
            raise DataError(
                f"{self.name} has nothing in its {split} split (it has: {', '.join(full) or 'nothing at all'}): build "
                "it from more text"
            )
        self.split = self.manifest.splits[split]
        self.size = self.split.size
        """Tokens, or bytes of raw text: what parts and positions are counted in."""
        self.shards = [self._open(entry, address, store, cache or Cache()) for entry in self.split.shards]
        self._reading: dict[int, tuple[int, int, ShuffledShard, int]] = {}
        """By slot: a range of what it reads, counted as in `read`, that lies in one shard; and the shift to there."""
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._shuffled: OrderedDict[tuple[int, int], ShuffledShard] = OrderedDict()

    def _open(self, entry: ShardEntry, address: str, store: Store | None, cache: Cache) -> Shard:
        if store is None:
            return Shard.of(Path(address), entry, self._dtype)
        check_paths(entry, self.name)
        return RemoteShard(store, entry, self._dtype, cache)

    @property
    def _dtype(self) -> str:
        return "uint8" if self.split.is_text else self.manifest.dtype

    def special_tokens(self) -> dict[str, int]:
        """Ids of the tokenizer's special tokens by text; none where its file is not here."""
        text = self.tokenizer_file()
        if text is None:
            return {}
        return {token["content"]: token["id"] for token in json.loads(text).get("added_tokens", [])}

    def tokenizer_file(self) -> bytes | None:
        """The tokenizer.json that the ids were made with; None where it is not beside a local data set."""
        name = self.manifest.tokenizer.file
        if self._store is not None:
            return read_whole(self._store, name)
        path = Path(self._address) / name
        return path.read_bytes() if path.exists() else None

    def part(self, slot: int, n_slots: int) -> tuple[int, int]:
        """The range of every epoch that a slot reads."""
        return slot * self.size // n_slots, (slot + 1) * self.size // n_slots

    def read(self, slot: int, n_slots: int, start: int, count: int) -> list[Stretch]:
        """What a slot that has read `start` tokens reads next, `count` tokens in all."""
        known = self._reading.get(slot)
        if known is not None and known[0] <= start and start + count <= known[1]:  # well inside a shard, as mostly
            shard, shift = known[2:]
            return [Stretch(shard, start + shift, start + count + shift)]
        found: list[Stretch] = []
        low, high = self.part(slot, n_slots)
        while count:
            epoch, offset = divmod(start, high - low)
            n = min(count, high - low - offset)
            found += self.stretches(epoch, low + offset, low + offset + n)
            self._look_ahead(epoch, low + offset + n)
            start += n
            count -= n
        shard, _, stop = found[-1]
        upto = start + min(int(shard.end[-1]) - stop, high - low - offset - n)
        self._reading[slot] = start, upto, shard, stop - start
        return found

    def stretches(self, epoch: int, start: int, stop: int) -> Iterator[Stretch]:
        """[start, stop) of an epoch's stream."""
        shards = self._epoch(epoch)
        place = int(shards.end.searchsorted(start, side="right"))
        while start < stop:
            begin, end = int(shards.begin[place]), int(shards.end[place])
            upto = min(stop, end)
            if upto > start:  # a shard may be empty
                yield Stretch(self._shuffle(epoch, shards, place), start - begin, upto - begin)
            start, place = upto, place + 1

    def next_document(self, slot: int, n_slots: int, start: int) -> tuple[int, ShuffledShard, int, int]:
        """The first document that begins where `start`, counted as in `read`, is, or after it in the slot's part.

        Returns:
            its position, its shard, its place in there, and the position of what follows it.

        Raises:
            DataError: no document begins in the slot's part.
        """
        low, high = self.part(slot, n_slots)
        for epoch in range(start // (high - low), start // (high - low) + _EPOCHS):
            first = low + start - epoch * (high - low)
            begin, shard, place = self._first_beginning(epoch, max(first, low))
            if shard is not None and begin < high:
                position = epoch * (high - low) + begin - low
                size = int(shard.end[place] - shard.begin[place])
                self._look_ahead(epoch, begin)
                return position, shard, place, min(position + size, (epoch + 1) * (high - low))
        raise DataError(f"no document of {self.name} begins in the part of slot {slot}: lower data.slots")

    def _first_beginning(self, epoch: int, start: int) -> tuple[int, ShuffledShard | None, int]:
        """The first document that begins at `start` of an epoch's stream or after: where, its shard, its place."""
        shards = self._epoch(epoch)
        for number in range(int(shards.end.searchsorted(start, side="right")), len(shards.end)):
            if shards.end[number] > shards.begin[number]:  # a shard may be empty
                shard, begin = self._shuffle(epoch, shards, number), int(shards.begin[number])
                place = int(shard.begin.searchsorted(start - begin))
                if place < len(shard.begin):
                    return begin + int(shard.begin[place]), shard, place
        return 0, None, 0

    def _look_ahead(self, epoch: int, position: int) -> None:
        """Tell a remote shard which one a slot at this position comes to next."""
        shards = self._epoch(epoch)
        place = int(shards.end.searchsorted(position, side="right"))
        if place + 1 < len(shards.order):
            shard, following = (self.shards[shards.order[p]] for p in (place, place + 1))
            if isinstance(shard, RemoteShard) and isinstance(following, RemoteShard):
                shard.next = following

    def _epoch(self, epoch: int) -> "_Epoch":
        if epoch not in self._epochs:
            order = permutation(len(self.shards), self.seed, "shards", self.fingerprint, epoch)
            sizes = [s.entry.text_bytes if self.split.is_text else s.entry.tokens for s in self.shards]
            length = np.array(sizes, dtype=np.int64)[order]
            end = np.cumsum(length)
            _keep(self._epochs, epoch, _Epoch(order, end - length, end), 4)
        return self._epochs[epoch]

    def _shuffle(self, epoch: int, shards: "_Epoch", place: int) -> ShuffledShard:
        """The shard at a place of the epoch's order."""
        number = int(shards.order[place])
        key = (epoch, number)
        if key not in self._shuffled:
            shard = self.shards[number]
            order = permutation(len(shard.length), self.seed, "documents", self.fingerprint, epoch, number)
            _keep(self._shuffled, key, ShuffledShard(shard, order), _OPEN_SHARDS)
        self._shuffled.move_to_end(key)
        return self._shuffled[key]


@dataclass(frozen=True)
class _Epoch:
    """The shards of an epoch in order, and where each begins and ends in its stream: int64 [shards]."""

    order: NDArray[np.int64]
    begin: NDArray[np.int64]
    end: NDArray[np.int64]


def read_manifest(address: str, store: Store | None) -> Manifest:
    """The manifest of the data set at `address`, which `store` reads where it is remote."""
    if store is None:
        return Manifest.read(Path(address))
    origin = f"{store.name}/{MANIFEST}"
    try:
        return Manifest.parse(json.loads(read_whole(store, MANIFEST)), origin)
    except ValueError as error:
        raise DataError(f"{origin} is not JSON ({error}): check the address, or upload the data set again") from error


def _keep(cache: OrderedDict, key: object, value: object, limit: int) -> None:
    """Remember `value`, and forget what was not asked for the longest time."""
    cache[key] = value
    while len(cache) > limit:
        cache.popitem(last=False)


def common_tokenizer(corpora: list[Corpus]) -> TokenizerEntry:
    """The tokenizer of all sources.

    Raises:
        DataError: there is more than one, or two sources hold the same data set.
    """
    first = corpora[0]
    for other in corpora[1:]:
        if other.manifest.tokenizer.fingerprint != first.manifest.tokenizer.fingerprint:
            raise DataError(
                f"{first.name} and {other.name} were made with different tokenizers "
                f"({first.manifest.tokenizer.fingerprint[:12]} and {other.manifest.tokenizer.fingerprint[:12]}): build "
                "both with the same one (--tokenizer FILE)"
            )
        if other.fingerprint == first.fingerprint:
            raise DataError(f"{first.name} and {other.name} hold the same data set: name it once and raise its weight")
    return first.manifest.tokenizer
