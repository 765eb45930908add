"""Slow answers are not waited for: a second request goes out, and the first answer counts.

Most reads of a server take about as long as each other, and a few take a hundred times as long, for reasons of one
machine or one connection. A shard needs hundreds of reads, so almost every shard would meet such a one.

Paper: Dean and Barroso 2013, "The Tail at Scale", Communications of the ACM 56(2), section "Hedged requests".
"""

import threading
from collections import defaultdict, deque
from queue import Empty, SimpleQueue
from time import monotonic

from megatrain.data.store import Store, TransientError

_KNOWN = 8  # reads of about the same size before it is known how long they take
_REMEMBERED = 64
_SLOW = 0.95  # a read is slow when it takes longer than this share of those that are remembered
_EXTRA = 0.1  # second requests for each read at most: a server that is slow as a whole is not asked twice as much


class Hedged:
    """`store`, whose reads of a range are asked for again where they are slow. Safe to use from several threads."""

    def __init__(self, store: Store):
        self.store, self.name, self.ranged = store, store.name, store.ranged
        self.n_reads = self.n_hedged = 0
        self._seconds: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        if stop is None or not self.ranged:
            return self.store.read(path, start, stop)
        began, alike = monotonic(), (stop - start).bit_length() // 2
        answers: SimpleQueue[bytes | Exception] = SimpleQueue()
        self.n_reads += 1
        self._ask(answers, path, start, stop)
        under_way = 1
        try:
            answer = answers.get(timeout=self._patience(alike))
        except Empty:
            self.n_hedged += 1
            self._ask(answers, path, start, stop)
            under_way = 2
            answer = answers.get()
        if isinstance(answer, TransientError) and under_way == 2:
            answer = answers.get()  # the other one may still come
        if isinstance(answer, Exception):
            raise answer
        self._seconds[alike].append(monotonic() - began)
        return answer

    def _ask(self, answers: "SimpleQueue[bytes | Exception]", path: str, start: int, stop: int) -> None:
        def run() -> None:
            try:
                answers.put(self.store.read(path, start, stop))
            except Exception as error:
                answers.put(error)

        # A thread of its own, which ends with the process: who lost the race may hang for as long as a read may take.
        threading.Thread(target=run, daemon=True).start()

    def _patience(self, alike: int) -> float | None:
        """Seconds to wait for a read; None for as long as it takes."""
        known = sorted(self._seconds[alike])
        if len(known) < _KNOWN or self.n_hedged >= 1 + _EXTRA * self.n_reads:
            return None
        return known[int(_SLOW * (len(known) - 1))]
