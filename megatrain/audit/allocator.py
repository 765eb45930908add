"""The documented rules of CUDA's caching allocator, so that reserved memory and fragmentation can be predicted.

One stream and default settings: blocks of 512 bytes; requests up to 1 MiB share segments of 2 MiB, those below 10 MiB
segments of 20 MiB, larger ones get segments of their own size rounded up to 2 MiB; the best fit is taken, split where
enough is left, and merged with free neighbours on release. The CUDA context, NCCL's buffers and cuBLAS' workspaces are
not in it.
"""

import bisect
from dataclasses import dataclass, field

MIB = 2**20
SMALL = MIB


@dataclass(frozen=True, order=True)
class Free:
    """A free block; ordered so that the first that is large enough is the best fit."""

    size: int
    segment: int
    start: int


@dataclass
class CachingAllocator:
    """Bytes `live` now, their `peak`, and what is `reserved` from the device (never given back)."""

    live: int = 0
    peak: int = 0
    reserved: int = 0
    _segments: int = 0
    _used: dict[int, tuple[bool, Free]] = field(default_factory=dict)
    _free: dict[bool, list[Free]] = field(default_factory=lambda: {False: [], True: []})
    _by_start: dict[tuple[int, int], Free] = field(default_factory=dict)
    _by_stop: dict[tuple[int, int], Free] = field(default_factory=dict)

    def allocate(self, key: int, size: int) -> None:
        """Give `size` bytes to the storage called `key`."""
        size = max(512, _up(size, 512))
        small = size <= SMALL
        block = self._best_fit(small, size)
        rest = block.size - size
        if rest >= (512 if small else SMALL + 1):
            self._add(small, Free(rest, block.segment, block.start + size))
            block = Free(size, block.segment, block.start)
        self._used[key] = small, block
        self.live += block.size
        self.peak = max(self.peak, self.live)

    def release(self, key: int) -> None:
        small, block = self._used.pop(key)
        self.live -= block.size
        after = self._by_start.get((block.segment, block.start + block.size))
        if after is not None:
            self._remove(small, after)
            block = Free(block.size + after.size, block.segment, block.start)
        before = self._by_stop.get((block.segment, block.start))
        if before is not None:
            self._remove(small, before)
            block = Free(block.size + before.size, block.segment, before.start)
        self._add(small, block)

    def _best_fit(self, small: bool, size: int) -> Free:
        free = self._free[small]
        at = bisect.bisect_left(free, Free(size, 0, 0))
        if at < len(free):
            block = free[at]
            self._remove(small, block)
            return block
        segment = 2 * MIB if small else 20 * MIB if size < 10 * MIB else _up(size, 2 * MIB)
        self.reserved += segment
        self._segments += 1
        return Free(segment, self._segments, 0)

    def _add(self, small: bool, block: Free) -> None:
        bisect.insort(self._free[small], block)
        self._by_start[block.segment, block.start] = block
        self._by_stop[block.segment, block.start + block.size] = block

    def _remove(self, small: bool, block: Free) -> None:
        free = self._free[small]
        del free[bisect.bisect_left(free, block)]
        del self._by_start[block.segment, block.start]
        del self._by_stop[block.segment, block.start + block.size]


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
