"""Who may commit to a run directory: one job at a time, each with a higher number than the one before.

The holder of the highest number in `RUN/lease/` is the owner. Its file is made with O_EXCL, so two jobs never get the
same number, and touched while the job lives. A job that lost its lease while it could not be seen (a network partition,
a suspended process) finds a higher number when it comes to commit, and is refused.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from megatrain.base.errors import CheckpointError, FailedCheckpointError
from megatrain.base.files import fsync_folder
from megatrain.base.log import log

BEAT_SECONDS = 2.0
LOOK_SECONDS = 0.2
LOST_AFTER_SECONDS = 30.0
"""A holder on another node without a sign of life for this long has lost its lease."""


class Lease:
    """The right to commit, held by this process until `release`."""

    def __init__(self, folder: Path, number: int):
        self.folder, self.number = folder, number
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="lease", daemon=True)

    @classmethod
    def take(cls, run_folder: str | Path) -> "Lease":
        """
        Raises:
            CheckpointError: another job holds the directory, or it cannot be written to.
        """
        folder = Path(run_folder) / "lease"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            number = 1
            if held := _numbers(folder):
                if reason := _alive(folder / _name(held[-1])):
                    raise CheckpointError(
                        f"{run_folder} is in use by {reason}: wait for its end, stop it, or give this run another name"
                    )
                number = held[-1] + 1
            with open(folder / _name(number), "x", encoding="utf-8") as file:
                json.dump(_here(), file)
                file.flush()
                os.fsync(file.fileno())
            fsync_folder(folder)
        except FileExistsError:
            raise CheckpointError(
                f"{run_folder} was taken by another job at this moment: start one job at a time"
            ) from None
        except OSError as error:
            raise CheckpointError(f"{run_folder} cannot be used as a run directory: {error}") from None
        lease = cls(folder, number)
        for old in held:
            (folder / _name(old)).unlink(missing_ok=True)
        lease._thread.start()
        return lease

    def check(self) -> None:
        """
        Raises:
            FailedCheckpointError: this job is not, or no longer, the holder.
        """
        held = _numbers(self.folder)
        if not held or held[-1] != self.number:
            raise FailedCheckpointError(
                f"this job's lease {self.number} on {self.folder.parent} was lost "
                f"(now {f'{held[-1]} holds it' if held else 'the lease folder is gone'}): another job may be writing; "
                "it must not commit"
            )

    def beat(self) -> None:
        """Show that this job lives."""
        with contextlib.suppress(FileNotFoundError):  # lost: the next check says so
            os.utime(self.folder / _name(self.number))

    def release(self) -> None:
        """Let the next job take the directory at once."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        path = self.folder / _name(self.number)
        # The file stays, so that numbers go on rising; its owner is nobody. One taken over is gone and not made anew.
        with contextlib.suppress(OSError), open(path, "r+", encoding="utf-8") as file:
            file.truncate()
            file.write(json.dumps({"released": True}))

    def _keep_beating(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                self.beat()


def run_identity(run_folder: str | Path, known: str | None = None) -> str:
    """The name that a run directory was given when it was first used; it goes into every commit.

    Args:
        known: the name in the commits that are there, taken where the directory has lost its own.
    """
    path = Path(run_folder) / "lease" / "run"
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        identity = known or uuid.uuid4().hex
        path.write_text(identity + "\n", encoding="utf-8")
        return identity


def _name(number: int) -> str:
    return f"{number:08d}"


def _numbers(folder: Path) -> list[int]:
    return sorted(int(name) for name in os.listdir(folder) if name.isdigit()) if folder.exists() else []


def _here() -> dict[str, Any]:
    return {"host": _host(), "pid": os.getpid(), "started": _started(os.getpid())}


def _host() -> str:
    """This node and, in a container, this container: where a process id means something."""
    spaces = [socket.gethostname()]
    with contextlib.suppress(OSError):
        spaces += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(spaces)


def _started(pid: int) -> str | None:
    """When a process began, in the kernel's ticks: a process id alone may have been given away again."""
    try:
        state_and_on = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state_and_on[0] == "Z" else state_and_on[19]


def _alive(path: Path) -> str | None:
    """Who holds this lease and lives, in words; None if nobody."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        host, pid, started = owner["host"], int(owner["pid"]), owner["started"]
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        if _silence(path) < LOST_AFTER_SECONDS and not _released(path):
            return "a job that is just starting"
        return None
    if host == _host():
        return f"process {pid} on this node" if _started(pid) == started else None
    return f"process {pid} on {host.split()[0]}, which lives" if _beats(path) else None


def _beats(path: Path) -> bool:
    """Whether a lease of another node is touched within the time that its holder has.

    A holder that lives is found within a beat or two; only after one that died (a job started again elsewhere) the
    whole time is waited for.
    """
    seen = path.stat().st_mtime_ns
    if (silence := _silence(path)) < LOST_AFTER_SECONDS:
        log("%s was in use on another node %.0f seconds ago: looking for a sign of life", path.parent.parent, silence)
    while _silence(path) < LOST_AFTER_SECONDS:
        time.sleep(LOOK_SECONDS)
        if path.stat().st_mtime_ns != seen:
            return True
    return False


def _released(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return bool(json.loads(path.read_text(encoding="utf-8")).get("released"))
    return False


def _silence(path: Path) -> float:
    """Seconds since a lease was touched, by the clock of the file system (nodes' clocks may differ)."""
    probe = path.with_name(f".probe-{os.getpid()}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except OSError:
        return time.time() - path.stat().st_mtime  # a read-only folder: this clock must do
    finally:
        probe.unlink(missing_ok=True)
