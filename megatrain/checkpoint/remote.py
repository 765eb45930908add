"""Checkpoints in an object store (s3://, gs://, ...) through fsspec, where nothing can be renamed.

Files are written under their final names, COMMIT last: the instant that object appears is the commit. A folder without
one is a save that was cut off; it is never taken, and goes when its step is saved again.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatrain.base.errors import CheckpointError
from megatrain.base.optional import optional
from megatrain.checkpoint.manifest import COMMIT
from megatrain.checkpoint.storage import Bytes, LocalStorage, Storage


class RemoteStorage:
    """Everything under a URL, such as s3://bucket/runs/a/checkpoints.

    Raises:
        CheckpointError: the package for this kind of URL is not installed, or the URL is none.
    """

    def __init__(self, url: str, **options: Any):
        self.url = url.rstrip("/")
        try:
            # Listings are not kept, since other ranks write.
            self._fs, self._root = optional("fsspec").core.url_to_fs(self.url, use_listings_cache=False, **options)
        except (ImportError, ValueError) as error:
            raise CheckpointError(f"{url} cannot be opened: {error}") from None

    def staging(self, folder: str) -> str:
        return folder

    def prepare(self, staging: str) -> None:
        self.delete(staging, COMMIT)

    def write(self, path: str, chunks: Iterable[Bytes]) -> None:
        with _as_os_error():
            file = self._fs.open(self._path(path), "wb")
            try:
                for chunk in chunks:
                    file.write(chunk)
            except BaseException:
                with contextlib.suppress(Exception):
                    file.discard()  # closing it would complete the object,
                    file.closed = True  # and so would its finaliser
                raise
            file.close()

    def publish(self, staging: str, folder: str) -> None:
        pass  # the COMMIT that was written last has done it

    def hint(self, name: str, content: bytes) -> None:
        with _as_os_error():
            self._fs.pipe_file(self._path(name), content)

    def folders(self) -> list[str]:
        with _as_os_error():
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self._root, detail=True)
            except FileNotFoundError:
                return []
            return [entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in found if entry["type"] == "directory"]

    def size(self, path: str) -> int | None:
        with _as_os_error():
            try:
                return self._fs.info(self._path(path))["size"]
            except FileNotFoundError:
                return None

    def read(self, path: str, start: int, stop: int) -> Bytes:
        with _as_os_error():
            return self._fs.cat_file(self._path(path), start=start, end=stop) if stop > start else b""

    def delete(self, folder: str, marker: str) -> None:
        with _as_os_error():
            for doomed, recursive in ((f"{folder}/{marker}", False), (folder, True)):
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm(self._path(doomed), recursive=recursive)

    def free_bytes(self) -> int | None:
        return None

    def describe(self, path: str = "") -> str:
        return f"{self.url}/{path}" if path else self.url

    def _path(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path}"


def open_storage(place: str | Path) -> Storage:
    """The storage at a path or at a URL."""
    return RemoteStorage(str(place)) if "://" in str(place) else LocalStorage(place)


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """Clients of object stores have errors of their own (no credentials, a reset connection)."""
    try:
        yield
    except (OSError, CheckpointError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
