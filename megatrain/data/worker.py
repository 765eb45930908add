"""A process that reads ahead: it fills batches in memory it shares with the feed, and says which are full.

It is a fresh interpreter and not a fork, so it holds none of the trainer's threads, locks or device contexts, and it
loads neither torch nor deepspeed, so it starts at once. The memory has no name in the file system and the only tie to
the feed is a socket: when either process dies, however it dies, nothing is left behind.
"""

import json
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from megatrain.base.errors import RunError, UserError
from megatrain.base.log import warn
from megatrain.data.rows import Arrays, Piece, arrays_in, n_bytes
from megatrain.data.stream import Order, Stream

N_BUFFERS = 3
"""Batches that a worker may be ahead, the one that the trainer copies from included."""
_PATIENCE = 60.0  # seconds of silence before a person is told
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from megatrain.data.worker import main; main()"


@dataclass(frozen=True)
class Task:
    """What a worker is told first: it makes each `n_workers`-th batch, from its `index`-th on."""

    order: Order
    cursors: dict[str, Any] | None
    index: int
    n_workers: int


@dataclass(frozen=True)
class Filled:
    """A worker's word that a buffer holds the next of its batches."""

    buffer: int
    seq_len: int
    most_documents: int
    cursors: dict[str, Any]
    skipped: list[Piece]


@dataclass(frozen=True)
class Failed:
    """A worker's last word."""

    error: Exception


# ------------------------------------------------------------------------------------------- in the trainer's process


class Worker:
    """The feed's side of a worker process."""

    def __init__(self, task: Task):
        self.index = task.index
        self.n_rows, self.size = task.order.n_rows, n_bytes(task.order.n_rows, task.order.data.seq_len)
        self._memory = os.memfd_create("megatrain-batches")
        os.ftruncate(self._memory, N_BUFFERS * self.size)
        self._map = mmap.mmap(self._memory, 0)
        ours, theirs = socket.socketpair()
        arguments = [json.dumps(sys.path), str(theirs.fileno()), str(self._memory)]
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _START, *arguments],
                pass_fds=(theirs.fileno(), self._memory),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the trainer, which still wants batches to end its step
            )
        self._connection = Connection(ours.detach())
        self._connection.send_bytes(pickle.dumps(task))
        self._to_free: int | None = None

    def next(self) -> tuple[Arrays, Filled]:
        """The worker's next batch; the arrays are overwritten after the next call.

        Raises:
            UserError: what the worker met.
            RunError: the worker is dead.
        """
        if self._to_free is not None:
            self._send(self._to_free)
        try:
            while not self._connection.poll(_PATIENCE):
                warn("data worker %d has delivered nothing for %.0f seconds; waiting on", self.index, _PATIENCE)
            said = self._connection.recv()
        except (EOFError, OSError):
            self._report_death()
        if isinstance(said, Failed):
            raise said.error
        self._to_free = said.buffer
        view = memoryview(self._map)[said.buffer * self.size : (said.buffer + 1) * self.size]
        return arrays_in(view, self.n_rows, said.seq_len), said

    def _send(self, buffer: int) -> None:
        try:
            self._connection.send(buffer)
        except OSError:  # it is dead, which reading what it said last reports better
            self._to_free = None

    def _report_death(self) -> None:
        code = self.process.wait()
        how = f"was killed by signal {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        hint = "; SIGKILL often means that the machine ran out of memory" if code == -signal.SIGKILL else ""
        raise RunError(
            f"data worker {self.index} (process {self.process.pid}) {how}{hint}: start the run again, it goes on from "
            "its last checkpoint; with data.workers: 0 the trainer reads by itself"
        ) from None

    def close(self) -> None:
        self._connection.close()
        self.process.kill()
        self.process.wait()
        os.close(self._memory)


# ------------------------------------------------------------------------------------------- in the worker's process


def main() -> None:
    """The worker's life, from the arguments (path, socket, memory) of its command line."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a scheduler warns every process; the trainer decides when to end
    connection = Connection(int(sys.argv[2]))
    memory = mmap.mmap(int(sys.argv[3]), 0)
    try:
        _work(pickle.loads(connection.recv_bytes()), memory, connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the trainer is gone or has closed its feed
    except UserError as error:
        connection.send(Failed(error))
    except Exception:
        connection.send(Failed(RuntimeError(f"in data worker:\n{traceback.format_exc()}")))


def _work(task: Task, memory: mmap.mmap, connection: Connection) -> None:
    stream = Stream(task.order, task.cursors)
    size, parent = n_bytes(task.order.n_rows, task.order.data.seq_len), os.getppid()
    free = deque(range(N_BUFFERS))
    turn = 0
    while True:
        if turn % task.n_workers != task.index:
            stream.skip()
        else:
            while not free or connection.poll(0):
                while not connection.poll(5.0):
                    if os.getppid() != parent:  # another child of the trainer may hold the socket open after it died
                        return
                free.append(connection.recv())
            buffer = free.popleft()
            view = memoryview(memory)[buffer * size : (buffer + 1) * size]
            shape = stream.shape
            most_documents, rows = stream.fill(arrays_in(view, *shape))
            connection.send(Filled(buffer, shape[1], most_documents, stream.cursors(), rows.skipped))
        turn += 1
