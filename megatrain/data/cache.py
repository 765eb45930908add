"""Copies of remote files on local disk, known by their content.

A file is stored under its sha256, so another version or another file of the same name can never be taken for it. It is
fetched by one process of the host while the others wait, appears under its name only when it is whole and its digest
is right, and the files that were not used for the longest time go when the limit is reached. Removing one that another
process has mapped is harmless: its pages stay until it is done.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated

from megatrain.base.errors import DataError
from megatrain.base.files import sha256_of


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Where copies of remote shards are kept."""

    dir: str = "~/.cache/megatrain"
    limit: Annotated[int, "bytes"] = 200 * 10**9
    """Bytes on disk; the file that is being fetched comes on top."""

    @property
    def folder(self) -> Path:
        return Path(self.dir).expanduser() / "files"

    def path(self, sha256: str) -> Path:
        return self.folder / sha256[:2] / sha256

    def find(self, sha256: str) -> Path | None:
        """The whole file of that digest, if it is here."""
        path = self.path(sha256)
        try:
            os.utime(path)  # it was used now
        except OSError:
            return None
        return path

    def get(self, sha256: str, size: int | None, name: str, fetch: Callable[[IO[bytes]], None]) -> Path:
        """The file of that digest, fetched if it is not here.

        Args:
            name: what people call it, for errors.
            fetch: writes the file's bytes from where the file stands to its end; it may be called again.

        Raises:
            DataError: twice, what was fetched was not the file that the manifest promises.
        """
        path = self.path(sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if found := self.find(sha256):
                return found
            partial = path.with_suffix(".partial")  # what a killed process had fetched is gone on with
            for _ in range(2):
                with open(partial, "ab") as file:
                    fetch(file)
                    file.flush()
                    os.fsync(file.fileno())
                if size in (None, partial.stat().st_size) and sha256_of(partial) == sha256:
                    os.replace(partial, path)
                    path.with_suffix(".lock").unlink()
                    self._make_room(path)
                    return path
                partial.unlink()
        raise DataError(
            f"{name} is not the file that its manifest promises (sha256 {sha256[:12]}): it was damaged or replaced at "
            "its source; upload it again"
        )

    def _make_room(self, keep: Path) -> None:
        """Remove what was not used for the longest time until the limit holds."""
        found = []
        for path in self.folder.glob("??/*"):
            with contextlib.suppress(OSError):  # another process removed it
                if not path.suffix:
                    stat = path.stat()
                    found.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.limit:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that the system releases when the process ends, however it ends."""
    while True:
        with open(path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                current = os.stat(path).st_ino == os.fstat(file.fileno()).st_ino
            except FileNotFoundError:
                current = False
            if current:  # and not one that its last holder removed while we waited
                yield
                return
