"""Start N ranks of one command on this machine and end with one exit code for all of them.

Ranks find each other on a port that the system chose: this process opens it and rank 0 inherits it, so nobody else can
take it in between. Each rank leads a session of its own, so that Ctrl-C reaches it once, through us, and each dies
with us even if we are killed. Why not torch's elastic agent: CONTRIBUTING.md, why 10.
"""

import collections
import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from megatrain.base.errors import EXIT_FAILURE, EXIT_PREEMPTED, EXIT_USAGE, ConfigError
from megatrain.cluster.identity import LOCAL_LAUNCHER, LOOPBACK

GRACE_SECONDS = 10.0
"""How long the other ranks may go on once one has failed: time to notice and to say their own words."""

EXIT_INTERRUPTED = 128 + signal.SIGINT

_POLL_SECONDS = 0.05
_KEPT_LINES = 200
_OTHER_LAUNCHERS = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|LOCAL_SIZE|ROLE_NAME|MASTER_(ADDR|PORT)|(TORCHELASTIC|OMPI|PMI)_.*"
)
"""Variables by which another launcher names its ranks: ours must not inherit them."""


def run_local_ranks(n: int, command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Run `command` as `n` ranks that know each other, and wait for all of them.

    Rank 0 writes to this process's stdout and stderr as if it were alone. Of the other ranks, warnings (lines that
    begin with "[rank") are passed on; all they said is shown when one of them is the first to fail.

    The first Ctrl-C or SIGTERM is handed to every rank, which then end in their own time; a second Ctrl-C kills them.

    Args:
        environment: what the ranks inherit; this process's by default.

    Returns:
        0 if every rank returned 0; 75 if the others were preempted; 2 if the first to fail refused its call or
        config; 130 after a second Ctrl-C; else 1.

    Raises:
        ConfigError: `n` is below 1.
    """
    if n < 1:
        raise ConfigError(f"--nproc {n} starts no rank: give a number from 1")
    ranks = _start(n, command, dict(os.environ if environment is None else environment))
    try:
        with _signals_handed_to(ranks) as interrupts:
            first = _wait(ranks, interrupts)
        if len(interrupts) > 1:
            return EXIT_INTERRUPTED
        if first is not None:
            _explain(first, ranks)
            return EXIT_USAGE if first.code == EXIT_USAGE else EXIT_FAILURE
        return EXIT_PREEMPTED if any(rank.code == EXIT_PREEMPTED for rank in ranks) else 0
    finally:
        for rank in ranks:
            rank.end()


def die_with_parent() -> None:
    """Ask Linux to kill this process when the one that started it ends, however it ends."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


# ------------------------------------------------------------------------------------------------ one rank


@dataclass
class _Rank:
    number: int
    process: "subprocess.Popen[bytes]"
    said: "collections.deque[str]" = field(default_factory=lambda: collections.deque(maxlen=_KEPT_LINES))
    """The last lines of its stdout and stderr; rank 0's go to the console instead."""
    reader: threading.Thread | None = None

    @property
    def code(self) -> int | None:
        return self.process.poll()

    @property
    def failed(self) -> bool:
        return self.code not in (None, 0, EXIT_PREEMPTED)

    def listen(self) -> None:
        if self.process.stdout is not None:
            self.reader = threading.Thread(target=self._read, name=f"rank {self.number}", daemon=True)
            self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as pipe:
            for line in pipe:
                text = line.decode(errors="replace").rstrip("\n")
                self.said.append(text)
                if text.startswith("[rank "):
                    sys.stderr.write(text + "\n")  # one write, or rank 0's words come between a line and its end
                    sys.stderr.flush()

    def send(self, signal_number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal_number)

    def end(self) -> None:
        """Kill what is left of it and of what it started, unless it ended well (then its children may finish)."""
        if self.code is None or self.failed:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.reader is not None:
            self.reader.join(timeout=1)  # a child that lives on may hold the pipe open


def _start(n: int, command: Sequence[str], environment: dict[str, str]) -> list[_Rank]:
    environment = {name: value for name, value in environment.items() if not _OTHER_LAUNCHERS.fullmatch(name)}
    environment |= {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": LOOPBACK}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are here, and a host's name may not resolve
    parent = os.getpid()

    def bind_to_parent() -> None:
        die_with_parent()
        if os.getppid() != parent:  # it ended before we could ask
            os._exit(EXIT_FAILURE)

    ranks: list[_Rank] = []
    with socket.create_server((LOOPBACK, 0), backlog=max(128, n)) as listener:
        environment["MASTER_PORT"] = str(listener.getsockname()[1])
        for rank in range(n):
            fd = listener.fileno() if rank == 0 else -1
            process = subprocess.Popen(
                list(command),
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), LOCAL_LAUNCHER: str(fd)},
                stdin=subprocess.DEVNULL,
                stdout=None if rank == 0 else subprocess.PIPE,
                stderr=None if rank == 0 else subprocess.STDOUT,
                pass_fds=[fd] if rank == 0 else [],
                start_new_session=True,
                preexec_fn=bind_to_parent if sys.platform == "linux" else None,  # no thread runs here yet
            )
            ranks.append(_Rank(rank, process))
    for each in ranks:
        each.listen()
    return ranks


# ------------------------------------------------------------------------------------------------ all ranks


@contextlib.contextmanager
def _signals_handed_to(ranks: Sequence[_Rank]) -> Iterator[list[int]]:
    """Hand signals on while inside; yields the list of Ctrl-C received so far."""
    interrupts: list[int] = []
    terminated: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        interrupts.append(number)
        for rank in ranks:
            rank.send(signal.SIGINT if len(interrupts) == 1 else signal.SIGKILL)

    def terminate(number: int, frame: object) -> None:
        terminated.append(number)  # first of all: the next signal may come while this one is handed on
        if len(terminated) == 1:  # asking twice adds nothing: they are saving
            for rank in ranks:
                rank.send(signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():  # only the main thread hears signals
        yield interrupts
        return
    handlers = {signal.SIGINT: interrupt, signal.SIGTERM: terminate}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup asked to outlive the terminal
        handlers[signal.SIGHUP] = terminate
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: Sequence[_Rank], interrupts: list[int]) -> _Rank | None:
    """Wait until all ranks have ended; the first that failed, if one did. The others then get `GRACE_SECONDS`."""
    first: _Rank | None = None
    deadline = float("inf")
    while any(rank.code is None for rank in ranks):
        if first is None:
            first = _first_failure(ranks)
            deadline = time.monotonic() + GRACE_SECONDS if first else deadline
        if time.monotonic() > deadline:
            for rank in ranks:
                rank.end()
        time.sleep(_POLL_SECONDS)
    return first or _first_failure(ranks)


def _first_failure(ranks: Sequence[_Rank]) -> _Rank | None:
    """Of the ranks found failed together, one that refused its config says more than one that lost its peer."""
    failed = [rank for rank in ranks if rank.failed]
    return min(failed, key=lambda rank: (rank.code != EXIT_USAGE, rank.number), default=None)


def _explain(first: _Rank, ranks: Sequence[_Rank]) -> None:
    """Show the words of the rank that failed first; rank 0's are on the console already."""
    if first.code == EXIT_USAGE and ranks[0].code == EXIT_USAGE:
        return  # every rank refused the same call, and rank 0 has said why
    if first.reader is not None:
        first.reader.join(timeout=1)
    if first.number != 0:
        words = [line for line in first.said if not line.startswith("[rank ")]  # those were passed on already
        if words:
            print(f"rank {first.number} said:", *words, sep="\n", file=sys.stderr)
    if first.code != EXIT_USAGE:
        others = "; the others were ended" if len(ranks) > 1 else ""
        print(f"rank {first.number} of {len(ranks)} {_how_it_ended(first)}{others}", file=sys.stderr, flush=True)


def _how_it_ended(rank: _Rank) -> str:
    code = rank.process.returncode
    if code >= 0:
        return f"failed with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
