"""Where checkpoints lie: a small protocol, and the file systems that hold it.

A path is relative to the storage's root, with "/" between its parts: "step-00000100/manifest.json".
"""

import contextlib
import errno
import mmap
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from megatrain.base.errors import CheckpointError, FailedCheckpointError
from megatrain.base.files import fsync_folder

Bytes = bytes | bytearray | memoryview


class Storage(Protocol):
    """What saving and loading need of a file system. What `write` and `publish` return from is durable.

    Every method may raise OSError.
    """

    def staging(self, folder: str) -> str:
        """Where the files of `folder` are written before it is published: another place for every save."""
        ...

    def prepare(self, staging: str) -> None:
        """An empty folder to write into."""
        ...

    def write(self, path: str, chunks: Iterable[Bytes]) -> None:
        """A new file. Each chunk is asked for when the one before it is written."""
        ...

    def publish(self, staging: str, folder: str) -> None:
        """Make what was written to `staging` appear as `folder`, instead of an older one of that name."""
        ...

    def hint(self, name: str, content: bytes) -> None:
        """A small file that is replaced as a whole."""
        ...

    def folders(self) -> list[str]:
        """Names of the folders under the root, in no order."""
        ...

    def size(self, path: str) -> int | None:
        """Bytes of a file; None if there is none."""
        ...

    def read(self, path: str, start: int, stop: int) -> Bytes:
        """The bytes [start, stop) of a file; fewer if it ends before. A view of the file where that is possible."""
        ...

    def delete(self, folder: str, marker: str) -> None:
        """Remove a folder. First, and durably, it loses its name or its file `marker`; then the rest goes."""
        ...

    def free_bytes(self) -> int | None:
        """Room for more; None if there is no limit that can be known."""
        ...

    def describe(self, path: str = "") -> str:
        """The path as a person would write it."""
        ...


class LocalStorage:
    """A folder of a local file system, or of one that all ranks share."""

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def staging(self, folder: str) -> str:
        # Never the same twice: a rank of a job that was killed may still be writing to the one before.
        return f".{folder}.{uuid.uuid4().hex[:8]}.partial"

    def prepare(self, staging: str) -> None:
        shutil.rmtree(self.root / staging, ignore_errors=True)
        (self.root / staging).mkdir(parents=True)

    def write(self, path: str, chunks: Iterable[Bytes]) -> None:
        target = self.root / path
        with open(target, "xb", buffering=0) as file:
            for chunk in chunks:
                view = memoryview(chunk)
                while view:  # an unbuffered write may take only a part
                    view = view[file.write(view) :]
            os.fsync(file.fileno())
        fsync_folder(target.parent)

    def publish(self, staging: str, folder: str) -> None:
        new, old, final = self.root / staging, self.root / f".{folder}.replaced", self.root / folder
        fsync_folder(new)
        if final.exists():
            # A reader that comes between the two renames finds the old one under its other name.
            shutil.rmtree(old, ignore_errors=True)
            os.rename(final, old)
        os.rename(new, final)
        fsync_folder(self.root)
        shutil.rmtree(old, ignore_errors=True)

    def hint(self, name: str, content: bytes) -> None:
        aside = self.root / f".{name}.partial"  # one name, so that what a crash leaves is overwritten
        self.root.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content)
        os.replace(aside, self.root / name)

    def folders(self) -> list[str]:
        if not self.root.exists():
            return []
        with os.scandir(self.root) as found:
            return [entry.name for entry in found if entry.is_dir()]

    def size(self, path: str) -> int | None:
        try:
            return (self.root / path).stat().st_size
        except FileNotFoundError:
            return None

    def read(self, path: str, start: int, stop: int) -> Bytes:
        # Mapped copy-on-write: a part that is not touched is not read, and the file cannot be changed through it.
        with open(self.root / path, "rb") as file:
            stop = min(stop, os.fstat(file.fileno()).st_size)
            if start >= stop:
                return b""
            first = start - start % mmap.ALLOCATIONGRANULARITY
            mapped = mmap.mmap(file.fileno(), stop - first, access=mmap.ACCESS_COPY, offset=first)
        return memoryview(mapped)[start - first :]

    def delete(self, folder: str, marker: str) -> None:
        doomed = self.root / folder
        if not folder.startswith(
            "."
        ):  # without its name it is no candidate, and what has the name and no marker is damage
            doomed = self.root / f".{folder}.deleted"
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(self.root / folder, doomed)
            fsync_folder(self.root)
        (doomed / marker).unlink(missing_ok=True)
        fsync_folder(doomed)
        shutil.rmtree(doomed)

    def free_bytes(self) -> int | None:
        at = self.root
        while not at.exists():
            at = at.parent
        return shutil.disk_usage(at).free

    def describe(self, path: str = "") -> str:
        return str(self.root / path) if path else str(self.root)


def new_place(path: str | Path, what: str = "folder") -> Path:
    """Where something new is to be written, found free before any work is done for it.

    Raises:
        CheckpointError: something is there, or nothing of that name can be.
    """
    path, given = Path(path), str(path)
    try:
        if os.path.lexists(path):
            raise CheckpointError(f"{given} exists: name a new {what}, or remove it")
        if what == "file" and given.endswith("/"):
            raise CheckpointError(f"{given} is the name of a folder: name a new file")
        longest = os.pathconf("/", "PC_NAME_MAX") - len(".partial-12345678")
        if not path.name or len(os.fsencode(path.name)) > longest:
            raise CheckpointError(f"{given!r} is no name for a {what}: give one of 1 to {longest} bytes")
        above = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
        if not above.is_dir():
            raise CheckpointError(f"{given} cannot be, {above} is no folder: name a new {what} elsewhere")
        if not os.access(above, os.W_OK | os.X_OK):
            raise CheckpointError(f"{given} cannot be written, {above} may not be written to: make it writable")
    except OSError as error:  # a path too long
        raise CheckpointError(f"{given!r} cannot be written ({error}): name a new {what} elsewhere") from None
    return path


NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


MAKE_ROOM = "make room"


def refusal(
    error: OSError, doing: str, storage: Storage, needed: int | None = None, remedy: str = MAKE_ROOM
) -> FailedCheckpointError:
    """An error of the file system as a sentence; a full disk with the bytes that are needed and free."""
    if error.errno in NO_ROOM:
        free = None
        with contextlib.suppress(OSError):
            free = storage.free_bytes()
        return no_room(storage, needed, free, remedy)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return FailedCheckpointError(
            f"{doing} failed, {storage.describe()} may not be written to ({error}): make it writable"
        )
    return FailedCheckpointError(f"{doing} failed: {error}")


def no_room(storage: Storage, needed: int | None, free: int | None, remedy: str = MAKE_ROOM) -> FailedCheckpointError:
    return FailedCheckpointError(
        f"no room for a checkpoint in {storage.describe()}: "
        f"{needed if needed is not None else 'more'} bytes are needed and {free if free is not None else 'too few'} "
        f"are free; {remedy}"
    )
