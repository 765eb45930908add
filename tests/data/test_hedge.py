"""Slow answers: the second request is taken where the first hangs, and never more often than agreed."""

import threading

import pytest

from megatrain.base.errors import DataError
from megatrain.data.hedge import Hedged
from megatrain.data.store import TransientError


class Scripted:
    """A store whose n-th read does what `script` says under n; others answer at once."""

    name, ranged = "scripted", True

    def __init__(self, script=None):
        self.script, self.n, self.lock = script or {}, 0, threading.Lock()
        self.released = threading.Event()

    def read(self, path, start=0, stop=None):
        with self.lock:
            number, self.n = self.n, self.n + 1
        return self.script.get(number, lambda: bytes(stop - start))()


def warmed(script):
    """A store after enough reads to know how long they take; the script begins after them."""
    store = Scripted()
    hedged = Hedged(store)
    hedged._patience = lambda alike: None  # so that no second request of these is still on its way afterwards
    for _ in range(40):
        hedged.read("a", 0, 100)
    del hedged._patience
    store.n, store.script, hedged.n_hedged = 0, script(store), 0
    return store, hedged


def hangs(store, then=lambda: b"late"):
    def answer():
        store.released.wait()
        return then()

    return answer


def fails(error):
    def answer():
        raise error

    return answer


def test_a_read_that_hangs_is_asked_for_again_and_the_first_answer_counts():
    store, hedged = warmed(lambda store: {0: hangs(store)})
    assert hedged.read("a", 0, 100) == bytes(100)  # without a second request this would wait for ever
    assert (store.n, hedged.n_hedged) == (2, 1)
    store.released.set()


def test_where_the_second_request_fails_the_first_is_waited_for():
    def releases(store):
        def answer():
            store.released.set()
            raise TransientError("busy")

        return answer

    _store, hedged = warmed(lambda store: {0: hangs(store), 1: releases(store)})
    assert hedged.read("a", 0, 100) == b"late"


def test_where_both_fail_the_failure_is_told():
    def releases(store):
        def answer():
            store.released.set()
            raise TransientError("one")

        return answer

    store, hedged = warmed(lambda store: {0: hangs(store, fails(TransientError("other"))), 1: releases(store)})
    with pytest.raises(TransientError):
        hedged.read("a", 0, 100)
    assert store.n == 2


@pytest.mark.parametrize("error", [TransientError("busy"), DataError("gone")])
def test_a_failure_before_anything_is_slow_is_told_at_once(error):
    store, hedged = warmed(lambda store: {0: fails(error)})
    hedged._patience = lambda alike: None  # a busy machine makes no read slow here
    with pytest.raises(type(error)):
        hedged.read("a", 0, 100)
    assert store.n == 1


def test_a_server_that_is_slow_as_a_whole_is_not_asked_twice_as_much():
    _store, hedged = warmed(lambda store: {})
    hedged.n_reads, hedged.n_hedged = 100, 11
    assert hedged._patience((100).bit_length() // 2) is None
    hedged.n_hedged = 5
    assert hedged._patience((100).bit_length() // 2) is not None


def test_nothing_is_hedged_before_it_is_known_how_long_a_read_takes():
    hedged = Hedged(Scripted())
    for _ in range(7):
        assert hedged._patience((100).bit_length() // 2) is None
        hedged.read("a", 0, 100)
    assert hedged._patience((2**30).bit_length() // 2) is None
