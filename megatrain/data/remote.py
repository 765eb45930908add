"""A shard that is elsewhere: documents can be read at once, while the whole shard is copied to the cache behind.

The first batch after a start or a resume waits for its own documents only. They are checked one by one against the
index, and the copy as a whole against the manifest before it is used.
"""

import contextlib
import mmap
import threading
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np

from megatrain.base.errors import DataError, UserError
from megatrain.base.log import warn
from megatrain.data.cache import Cache
from megatrain.data.manifest import ShardEntry
from megatrain.data.shards import Shard, Tokens
from megatrain.data.store import Store, append, fetch, read_whole

_READ_SINGLY = 32  # documents that are read of a shard before it is copied
_AT_ONCE = threading.Semaphore(4)  # whole shards that a process copies at the same time


class RemoteShard(Shard):
    """A `Shard` whose files come from a store, by way of a cache."""

    def __init__(self, store: Store, entry: ShardEntry, dtype: str, cache: Cache, patience: float = 300.0):
        super().__init__(cache.path(entry.sha256), cache.path(entry.index_sha256), entry, dtype)
        self.store, self.cache, self.patience = store, cache, patience
        self.name = f"{store.name}/{entry.path}"
        self._whole: Tokens | None = None
        self._copy: _Copy | None = None
        self._present: set[int] = set()
        self.next: RemoteShard | None = None
        """The shard that is needed after this one, copied when this one is here."""

    @property
    def ids(self) -> Tokens:
        """The tar as it is in the cache; until it is there, memory of its size that holds what was read so far."""
        if self._whole is None and self.cache.find(self.entry.sha256):
            with contextlib.suppress(DataError):  # removed since: the cache was full
                self._whole = self._map()
                self.__dict__.pop("_parts", None)
        return self._parts if self._whole is None else self._whole

    @cached_property
    def _parts(self) -> Tokens:
        return np.frombuffer(mmap.mmap(-1, self.entry.bytes), dtype=self.dtype)  # pages that nobody wrote take no room

    @cached_property
    def sound_index(self) -> Path:
        entry = self.entry
        if found := self.cache.find(entry.index_sha256):
            return found

        def write(file: IO[bytes]) -> None:
            file.truncate(0)
            file.write(read_whole(self.store, entry.index, patience=self.patience))

        return self.cache.get(entry.index_sha256, None, f"{self.store.name}/{entry.index}", write)

    def prepare(self) -> None:
        if self._copy is None:
            self._copy = _Copy(self)

    def damaged(self, number: int) -> bool:
        if len(self._present) == _READ_SINGLY:  # it is read in earnest, and the first batch is not kept waiting
            self.prepare()
        if not self.store.ranged and self._whole is None:
            self.fetch()
        if self.ids is not self._whole and number not in self._present:
            parts = self._parts  # by name: the copy behind may be ready, and `ids` another, at any moment
            first, last = int(self.start[number]), int(self.start[number] + self.length[number])
            size = self.dtype.itemsize
            found = b"".join(fetch(self.store, self.entry.path, first * size, last * size, patience=self.patience))
            parts[first:last] = np.frombuffer(found, dtype=self.dtype)
            self._present.add(number)
        return super().damaged(number)

    @cached_property
    def unreadable(self) -> str:
        if self.store.ranged:
            return ""
        try:
            self.fetch()
        except DataError as error:
            return str(error)
        return ""

    def fetch(self) -> None:
        """Have the whole shard in the cache."""
        entry = self.entry

        def write(file: IO[bytes]) -> None:
            append(self.store, entry.path, entry.bytes, file, self.patience)

        self.cache.get(entry.sha256, entry.bytes, self.name, write)


class _Copy:
    """A shard being copied by a thread that dies with its process. Failures are told, and met again by who reads."""

    def __init__(self, shard: RemoteShard):
        self._shard = shard
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with _AT_ONCE:
            try:
                self._shard.fetch()
            except (UserError, OSError) as error:
                warn("%s is read document by document, since it cannot be copied: %s", self._shard.name, error)
        if self._shard.next is not None:
            self._shard.next.prepare()
