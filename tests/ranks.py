"""Real gloo ranks for a test: fresh processes, a fresh process group, nothing left behind.

    def losses(zero: int) -> list[float]:                 # a function of the test module, run by every rank
        mesh = Mesh.of(dp=2).at(dist.get_rank()).connect()
        ...

    assert run(losses, 2, 1) == [expected, expected]      # one result per rank

Ranks are forked from a server that has torch and deepspeed loaded, so a start costs tenths of a second. DeepSpeed keeps
process-wide state: use one engine for each `run`.
"""

import contextlib
import faulthandler
import functools
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

PRELOADED = (
    "torch", "torch.distributed", "torch.testing", "torch._dynamo", "torch._inductor.compile_fx",
    "deepspeed", "deepspeed.runtime.zero.muon.original_muon", "deepspeed.runtime.zero.stage3",
    "numpy", "pytest", "hypothesis", "megatrain.config.build", "megatrain.models.decoder",
)  # fmt: skip
"""What ranks use and are slow to import: a first optimiser loads Dynamo, a first DeepSpeed engine Inductor."""

GRACE = 3.0  # seconds for other ranks to say their own cause once one has failed

UNCONNECTED = "Gloo connectFullMesh failed"

_server = multiprocessing.get_context("forkserver")


class RankError(AssertionError):
    """A rank failed, died or did not end in time; the message holds its words."""


def run(function: Callable[..., Any], n: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call `function(*args)` on `n` ranks of a new default process group and return each rank's result, in rank order.

    `function` stands at the top of a module; its arguments and its result can be pickled. Each rank has one thread and
    a TORCH_EXTENSIONS_DIR of its own; what it prints is shown when it fails.

    A group that gloo could not connect says nothing about `function`: its ranks are started once more (a busy machine
    drops a connection between two listeners now and then).

    Raises:
        RankError: a rank raised, died, was not done after `timeout` seconds, or left a process behind.
    """
    _start_server()
    try:
        return _run(function, n, args, timeout)
    except RankError as error:
        if UNCONNECTED not in str(error):
            raise
    return _run(function, n, args, timeout)


def _run(function: Callable[..., Any], n: int, args: tuple[Any, ...], timeout: float) -> list[Any]:
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        ranks = []
        try:
            for rank in range(n):
                receiver, sender = _server.Pipe(duplex=False)
                process = _server.Process(target=_rank, args=(rank, n, folder, sender, pickle.dumps((function, args))))
                process.start()
                sender.close()
                ranks.append((process, receiver))
            results = _collect(ranks, folder, time.monotonic() + timeout, timeout)
        finally:
            for process, receiver in ranks:
                _end(process)
                receiver.close()
        return results


def _collect(ranks: list[Any], folder: Path, deadline: float, timeout: float) -> list[Any]:
    """The results; or, once a rank has failed, the words of every rank that has any within `GRACE`."""
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    open_ranks = {receiver: rank for rank, (_, receiver) in enumerate(ranks)}
    while open_ranks:
        ready = connection.wait(list(open_ranks), timeout=max(0.0, deadline - time.monotonic()))
        for receiver in ready:
            rank = open_ranks.pop(receiver)
            try:
                ok, value = pickle.loads(receiver.recv_bytes())
            except EOFError:
                ranks[rank][0].join(GRACE)
                ok, value = False, f"died with exit code {ranks[rank][0].exitcode}\n"
            (results if ok else failures)[rank] = value
            if not ok:
                deadline = min(deadline, time.monotonic() + GRACE)
        if not ready:
            break
    if failures:
        causes_first = sorted(failures, key=lambda r: "Connection closed by peer" in failures[r])
        raise RankError("\n".join(f"rank {r}: {failures[r]}{_printed(folder, r)}" for r in causes_first))
    if open_ranks:
        hanging = sorted(open_ranks.values())
        stacks = "\n".join(f"rank {r} is at:\n{_stack(ranks[r][0], folder, r)}{_printed(folder, r)}" for r in hanging)
        raise RankError(f"ranks {hanging} of {len(ranks)} were not done after {timeout:g} s\n{stacks}")
    for rank, (process, _) in enumerate(ranks):
        process.join(GRACE)
        if process.exitcode is None:
            raise RankError(f"rank {rank} returned but did not end:\n{_stack(process, folder, rank)}")
        if _group_lives(process.pid):
            raise RankError(f"rank {rank} left a process behind{_printed(folder, rank)}")
    return [results[rank] for rank in range(len(ranks))]


# ------------------------------------------------------------------------------------------------ one rank


def _rank(rank: int, n: int, folder: Path, sender: Any, call: bytes) -> None:
    os.setsid()  # a process group of its own: whatever it starts can be found and ended
    log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable()  # a rank that crashes says where, in its log
    faulthandler.register(signal.SIGUSR1, file=open(folder / f"rank-{rank}.stack", "w"))  # noqa: SIM115
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n),
        "TORCH_EXTENSIONS_DIR": str(folder / f"extensions-{rank}"),
    }  # fmt: skip
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n)
        function, args = pickle.loads(call)
        answer = pickle.dumps((True, function(*args)))
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
        sender.send_bytes(answer)
        sys.stdout.flush()
        os._exit(1)  # its peers may wait in a collective: an orderly goodbye could wait for them
    dist.destroy_process_group()
    sender.send_bytes(answer)
    sender.close()


# ------------------------------------------------------------------------------------------------ processes


@functools.cache
def _start_server() -> None:
    _server.set_forkserver_preload(list(PRELOADED))
    with _environment(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", DS_BUILD_OPS="0"):
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        forkserver.ensure_running()
    warm = _server.Process(
        target=_nothing
    )  # returns when the server has loaded everything: no test's timeout pays for it
    warm.start()
    warm.join()


def _nothing() -> None:
    pass


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _end(process: Any) -> None:
    """Kill what is left of a rank and of everything it started."""
    if process.is_alive():
        process.kill()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    process.close()


def _group_lives(pid: int, patience: float = 1.0) -> bool:
    """A process of the group `pid` is alive; one that is just ending gets `patience` seconds."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.02)
    return True


def _stack(process: Any, folder: Path, rank: int) -> str:
    path = folder / f"rank-{rank}.stack"
    if not path.exists():
        return "its start\n"
    os.kill(process.pid, signal.SIGUSR1)
    deadline = time.monotonic() + GRACE
    while not path.stat().st_size and time.monotonic() < deadline:
        time.sleep(0.02)
    return path.read_text()


def _printed(folder: Path, rank: int) -> str:
    path = folder / f"rank-{rank}.log"
    text = path.read_text(errors="replace")[-4000:] if path.exists() else ""
    return f"it printed:\n{text}" if text else ""
