"""Where the files of a data set are: a folder, a web server, an object store, or a command that writes them.

A store answers one question, the bytes of a range of a file, and may fail at it: `fetch` asks again. What a person is
shown of an address never holds a password or a token.
"""

import http.client
import ipaddress
import re
import shlex
import socket
import subprocess
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from typing import IO, Any, Protocol
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from megatrain.base.errors import ConfigError, DataError, RunError
from megatrain.base.log import warn
from megatrain.base.optional import optional

CHUNK = 4 * 2**20
"""Bytes asked for at a time."""
FIRST_PAUSE = 0.1
"""Seconds before asking again; doubled each time until an answer comes."""
OBJECT_STORES = {"s3": "s3fs", "gs": "gcsfs"}
"""Schemes that fsspec reads, and the package that each needs."""


class TransientError(Exception):
    """A failure that another try may not meet."""


class Store(Protocol):
    name: str
    """What people are shown: no secrets."""
    ranged: bool
    """A part of a file costs less than the whole."""

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of a file, to its end where `stop` is None. May return fewer.

        Raises:
            TransientError: asking again may help.
            DataError: it will not.
        """
        ...


def redacted(address: str) -> str:
    """An address without user, password and query, for logs, errors and saved files.

    >>> redacted("https://me:secret@host:81/a?token=x")
    'https://host:81/a'
    """
    if "://" not in address:
        return "pipe:..." if address.startswith("pipe:") else address
    try:
        parts = urlsplit(address)
    except ValueError:
        return address.partition("://")[0] + "://..."
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def is_remote(address: str) -> bool:
    return "://" in address or address.startswith("pipe:")


def problems(address: str, allow_pipe: bool) -> list[str]:
    """Why no data is read from there, in sentences."""
    if address.startswith("pipe:"):
        if allow_pipe:
            return []
        return [f"{address.split()[0]} would run a command: set data.allow_pipe: true if you trust it"]
    if "://" not in address:
        return []
    try:
        parts = urlsplit(address)
        scheme, host, _ = parts.scheme, parts.hostname, parts.port
    except ValueError as error:
        return [f"{redacted(address)} is no address ({error}): write it like https://host/folder or s3://bucket/folder"]
    if scheme not in ("http", "https", *OBJECT_STORES):
        allowed = ", ".join(["http", "https", *OBJECT_STORES])
        return [f"{redacted(address)} has scheme {scheme}: allowed are {allowed}, and plain paths"]
    if not host:
        return [f"{redacted(address)} names no host: write it like https://host/folder or s3://bucket/folder"]
    if scheme in OBJECT_STORES and "@" in parts.netloc:
        return [
            f"{redacted(address)} has a user or password, which object stores do not take in an address: leave it out "
            "and give credentials in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile)"
        ]
    return []


def open_store(address: str, allow_pipe: bool = False) -> Store:
    """The store at a remote address."""
    if found := problems(address, allow_pipe):
        raise ConfigError(found)
    if address.startswith("pipe:"):
        return PipeStore(address.removeprefix("pipe:"))
    if urlsplit(address).scheme in OBJECT_STORES:
        return ObjectStore(address)
    return WebStore(address)


# ------------------------------------------------------------------------------------------------ asking again


def fetch(store: Store, path: str, start: int, stop: int, *, patience: float = 300.0) -> Iterator[bytes]:
    """Bytes [start, stop) of a file in pieces, going on after failures from where they struck.

    Args:
        patience: seconds without a single byte after which this gives up.

    Raises:
        RunError: the store gave nothing for too long.
    """
    last, pause = time.monotonic(), FIRST_PAUSE
    while start < stop:
        try:
            piece = store.read(path, start, min(stop, start + CHUNK))
            if not piece or len(piece) > stop - start:
                raise TransientError(f"it sent {len(piece)} of {min(CHUNK, stop - start)} bytes")
        except TransientError as error:
            waited = time.monotonic() - last
            if waited > patience:
                raise RunError(
                    f"{store.name}/{path} could not be read for {waited:.0f} seconds (last: {error}): look after the "
                    "server or the network, then start the run again; it goes on from its last checkpoint"
                ) from error
            if pause >= 1:
                warn("%s/%s: %s; trying again", store.name, path, error)
            time.sleep(pause)
            pause = min(2 * pause, 10.0)
            continue
        yield piece
        start += len(piece)
        last, pause = time.monotonic(), FIRST_PAUSE


def read_whole(store: Store, path: str, *, patience: float = 300.0) -> bytes:
    """A small file whose size is not known beforehand."""
    last, pause = time.monotonic(), FIRST_PAUSE
    while True:
        try:
            return store.read(path)
        except TransientError as error:
            if time.monotonic() - last > patience:
                raise RunError(f"{store.name}/{path} could not be read ({error}): look after the server") from error
            if pause >= 1:
                warn("%s/%s: %s; trying again", store.name, path, error)
            time.sleep(pause)
            pause = min(2 * pause, 10.0)


def append(store: Store, path: str, size: int, file: IO[bytes], patience: float = 300.0) -> None:
    """Write what is missing of a remote file of `size` bytes to `file`, a copy of its beginning."""
    for piece in fetch(store, path, file.tell(), size, patience=patience):
        file.write(piece)


# ------------------------------------------------------------------------------------------------ the kinds


class WebStore:
    """A folder on an HTTP server. User and password of the address become a header; its query goes with each file."""

    ranged = True

    def __init__(self, address: str, read_timeout: float = 20.0):
        self.name, self.read_timeout = redacted(address).rstrip("/"), read_timeout
        self._address = urlsplit(address)
        self._headers = _credentials(self._address)
        self._opener = urllib.request.build_opener(_SafeRedirects())

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        base = self._address
        url = urlunsplit(
            (base.scheme, base.netloc.rpartition("@")[2], f"{base.path.rstrip('/')}/{path}", base.query, "")
        )
        headers = self._headers | ({"Range": f"bytes={start}-{stop - 1}"} if stop is not None else {})
        try:
            with self._opener.open(urllib.request.Request(url, headers=headers), timeout=self.read_timeout) as answer:
                if stop is None:
                    return self._body(answer, None)
                if answer.status == 200:  # a server without ranges sends all of it
                    self._body(answer, start)
                return self._body(answer, stop - start)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (408, 425, 429) or error.code >= 500:
                raise TransientError(f"the server answered {error.code}") from None
            raise DataError(
                f"{self.name}/{path}: the server answered {error.code} {error.reason}: check the address and the "
                "access rights"
            ) from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            raise TransientError(f"{type(error).__name__}: {getattr(error, 'reason', error)}") from None

    def _body(self, answer: Any, limit: int | None) -> bytes:
        """What comes, at most `limit` bytes. A connection that breaks or drips is left with what it gave."""
        found, left = bytearray(), limit
        deadline = time.monotonic() + self.read_timeout
        while left is None or left > 0:
            try:
                piece = answer.read1(65536 if left is None else min(left, 65536))
            except (OSError, http.client.HTTPException):
                if limit is None:
                    raise
                break
            if not piece:
                promised = answer.headers.get("Content-Length")
                if limit is None and promised is not None and len(found) < int(promised):
                    raise TransientError(f"it sent {len(found)} of {promised} bytes")
                break
            found += piece
            left = None if left is None else left - len(piece)
            if time.monotonic() > deadline:
                break
        return bytes(found)


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect only where it cannot reach into this machine or its network on a stranger's behalf."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme not in ("http", "https") or (old.scheme == "https" and new.scheme == "http"):
            raise DataError(
                f"{redacted(req.full_url)} redirects to {redacted(newurl)}: such a redirect is not followed"
            )
        if new.hostname != old.hostname:
            for *_, address in socket.getaddrinfo(new.hostname, new.port or 443, type=socket.SOCK_STREAM):
                if not ipaddress.ip_address(address[0]).is_global:
                    raise DataError(
                        f"{redacted(req.full_url)} redirects to {redacted(newurl)}, which is not a public address: "
                        "such a redirect is not followed; give the address itself if it is meant"
                    )
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and new.hostname != old.hostname:
            request.remove_header("Authorization")  # it was meant for the first host
        return request


def _credentials(address: SplitResult) -> dict[str, str]:
    if address.username is None:
        return {}
    pair = f"{unquote(address.username)}:{unquote(address.password or '')}"
    return {"Authorization": f"Basic {b64encode(pair.encode()).decode()}"}


class ObjectStore:
    """A prefix in an object store, through fsspec. Credentials come from where the store's own tools look for them."""

    ranged = True

    def __init__(self, address: str, read_timeout: float = 20.0, **options: Any):
        import fsspec

        self.name, self.read_timeout = redacted(address).rstrip("/"), read_timeout
        scheme = urlsplit(address).scheme
        package = optional(OBJECT_STORES.get(scheme, "fsspec"))
        if not package:
            raise DataError(
                f"{self.name} needs {package.name}, which is not usable here: {package.why_not}; install it"
            )
        if scheme == "s3":  # `fetch` asks again, and says so; a client that does so too multiplies the waiting
            options = {"config_kwargs": {"read_timeout": read_timeout, "retries": {"max_attempts": 0}}} | options
        self._files, self._root = fsspec.core.url_to_fs(self.name, **options)
        if hasattr(self._files, "retries"):
            self._files.retries = 1

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        try:
            return self._read(f"{self._root}/{path}", start if start or stop is not None else None, stop)
        except (FileNotFoundError, PermissionError) as error:
            raise DataError(
                f"{self.name}/{path}: {type(error).__name__}: check the address and the access rights"
            ) from None
        except Exception as error:  # each backend has errors of its own; a lasting one ends when patience does
            if "Credentials" in type(error).__name__:
                raise DataError(
                    f"{self.name}: {error}: give them as the store's own tools take them (AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY, or a profile)"
                ) from None
            raise TransientError(f"{type(error).__name__}: {_without_queries(str(error))}") from None

    def _read(self, path: str, start: int | None, stop: int | None) -> bytes:
        from fsspec.asyn import AsyncFileSystem, sync

        if isinstance(self._files, AsyncFileSystem):  # a deadline for the whole answer, since a server may drip
            ask = self._files._cat_file
            return sync(self._files.loop, ask, path, start=start, end=stop, timeout=2 * self.read_timeout)
        return self._files.cat_file(path, start=start, end=stop)


def _without_queries(text: str) -> str:
    """An error's words without the queries of addresses in them, where signatures stand."""
    return re.sub(r"\?[^\s'\"]*", "", text)


class PipeStore:
    """A command that writes a file to its standard output; `{}` in it stands for the file's path. There is no shell."""

    ranged, name = False, "pipe:..."

    def __init__(self, command: str):
        self._words = shlex.split(command)
        if not any("{}" in word for word in self._words):
            raise ConfigError(f"pipe:{self._words[0]} ... has no {{}}, which stands for the path of the file to write")

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        done = subprocess.run([w.replace("{}", path) for w in self._words], capture_output=True, check=False)
        if done.returncode:
            raise TransientError(f"{self._words[0]} ended with code {done.returncode}")
        return done.stdout[start:stop]
