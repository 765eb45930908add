"""Token shards: webdataset tars with an index beside each, so that training seeks and never parses a tar.

    DIR/manifest.json              what there is: splits, shards, sizes, checksums, the tokenizer, where it came from
    DIR/tokenizer.json             the tokenizer the ids belong to
    DIR/train/shard-000000.tar     a webdataset: `KEY.tokens`, little-endian ids; `KEY.json`, what else is known
    DIR/train/shard-000000.index   safetensors: where each document's ids lie in the tar, and a checksum of each

KEY is a running number: the id of a document is any text, kept in the index, and never becomes a path. A document is
stored with its end-of-document token.
"""

import contextlib
import hashlib
import json
import os
import zlib
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from megatrain.base.errors import DataError
from megatrain.base.files import fsync_folder, sha256_of
from megatrain.data import tar
from megatrain.data.manifest import ShardEntry, check_paths

VERSION = 1  # of the index

Tokens = NDArray[np.integer[Any]]


# ------------------------------------------------------------------------------------------------ writing


class _Digest:
    """A file to write to that knows the sha256 and the number of bytes that went through."""

    def __init__(self, file: IO[bytes]):
        self.file, self.sha256, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self.file.write(data)


def save_columns(path: Path, columns: dict[str, NDArray[np.int64]], ids: list[str]) -> str:
    """Write an index, which appears under its name when it is whole; returns its sha256."""
    encoded = [document.encode() for document in ids]
    tensors: dict[str, Tokens] = {
        **columns,
        "id_bytes": np.frombuffer(b"".join(encoded), dtype=np.uint8),
        "id_ends": np.cumsum([len(i) for i in encoded], dtype=np.int64),
    }
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(aside, "wb"):  # with the permissions of a new file: safetensors writes for the owner alone
        mode = os.stat(aside).st_mode
    # One key of metadata, since safetensors writes several in any order, and equal shards must be equal files.
    save_file(tensors, aside, metadata={"version": str(VERSION)})
    os.chmod(aside, mode)
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    os.replace(aside, path)
    return sha256


class ShardWriter:
    """Writes one shard and its index. Both appear under their names when `close` has flushed them, or not at all.

    with ShardWriter(folder, "train", 0, "uint16") as writer:
        writer.write("books/12", tokens, text_bytes=812)
    entry = writer.entry
    """

    entry: ShardEntry

    def __init__(self, folder: Path, split: str, number: int, dtype: str):
        self.folder = folder
        self.path, self.index = f"{split}/shard-{number:06d}.tar", f"{split}/shard-{number:06d}.index"
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.tokens = 0
        self._rows: list[tuple[int, int, int, int]] = []
        self._ids: list[str] = []
        (folder / split).mkdir(parents=True, exist_ok=True)
        self._aside = folder / split / f".shard-{number:06d}.tar.{os.getpid()}.tmp"
        self._file = open(self._aside, "wb")  # noqa: SIM115
        self._digest = _Digest(self._file)

    @property
    def documents(self) -> int:
        return len(self._ids)

    @property
    def bytes(self) -> int:
        """Size of the tar so far."""
        return self._digest.bytes

    def write(self, document: str, tokens: Tokens, text_bytes: int, metadata: dict[str, Any] | None = None) -> None:
        """Append a document.

        Args:
            document: its id, any text; the trace and the ledger name it.
            tokens: [n], n > 0, ending with the end-of-document token.
            text_bytes: bytes of the UTF-8 text that the tokens stand for.
            metadata: what else is known of it, written beside the tokens.

        Raises:
            ValueError: there are no tokens, or an id does not fit the shard's type.
        """
        if not len(tokens) or tokens.min() < 0 or tokens.max() > np.iinfo(self.dtype).max:
            raise ValueError(
                f"document {document!r}: {len(tokens)} tokens that must be some, and fit {self.dtype.name}"
            )
        payload = np.ascontiguousarray(tokens, dtype=self.dtype).tobytes()
        if metadata:  # members stand in the order of their names
            described = json.dumps(metadata, ensure_ascii=False).encode()
            self._digest.write(tar.member(b"%09d.json" % self.documents, described))
        self._rows.append((self.bytes + tar.BLOCK, len(tokens), zlib.crc32(payload), text_bytes))
        self._digest.write(tar.member(b"%09d.tokens" % self.documents, payload))
        self._ids.append(document)
        self.tokens += len(tokens)

    def close(self) -> ShardEntry:
        """Flush and publish the tar and its index."""
        self._digest.write(tar.end(self.bytes))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        rows = np.array(self._rows, dtype=np.int64).reshape(-1, 4)
        columns = {name: rows[:, i].copy() for i, name in enumerate(("offset", "length", "crc32", "text_bytes"))}
        index_sha256 = save_columns(self.folder / self.index, columns, self._ids)
        os.replace(self._aside, self.folder / self.path)
        fsync_folder((self.folder / self.path).parent)
        self.entry = ShardEntry(
            path=self.path,
            bytes=self._digest.bytes,
            sha256=self._digest.sha256.hexdigest(),
            documents=self.documents,
            tokens=self.tokens,
            index=self.index,
            index_sha256=index_sha256,
            text_bytes=int(rows[:, 3].sum()),
        )
        return self.entry

    def discard(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(OSError):  # the disk may be full
            self._file.close()
        self._aside.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


# ------------------------------------------------------------------------------------------------ reading


class Shard:
    """A shard to read: documents by number, without parsing the tar. Columns of the index are int64 [documents].

    Whatever is read is checked first: the index against the manifest, each document against its checksum in the index,
    once. The tar's own headers are never looked at, so nothing written in them can do harm.
    """

    def __init__(self, tar: Path, index: Path, entry: ShardEntry, dtype: str):
        self.tar, self.index, self.entry = tar, index, entry
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.name = str(tar)

    @classmethod
    def of(cls, folder: Path, entry: ShardEntry, dtype: str) -> Self:
        """The shard that a manifest in `folder` names.

        Raises:
            DataError: the manifest names a file outside its folder.
        """
        check_paths(entry, str(folder))
        return cls(folder / entry.path, folder / entry.index, entry, dtype)

    @cached_property
    def ids(self) -> Tokens:
        """All of the tar as token ids, memory-mapped: documents are ranges of it, tar headers the rest."""
        return self._map()

    def _map(self) -> Tokens:
        size = self.tar.stat().st_size if self.tar.exists() else None
        if size != self.entry.bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise DataError(
                f"shard {self.tar} {found} and the manifest says {self.entry.bytes} bytes: copy it again, or build the "
                "data set again"
            )
        if size < self.dtype.itemsize * (self.start + self.length).max(initial=0):
            raise DataError(f"index {self.index} points beyond the end of {self.tar}: build the data set again")
        mapped = np.memmap(self.tar, dtype=self.dtype, mode="r", shape=(size // self.dtype.itemsize,))
        return np.asarray(mapped)  # the same memory without the subclass, whose every slice costs a Python call

    @cached_property
    def start(self) -> NDArray[np.int64]:
        """First element of each document in `ids`."""
        return self.column("offset") // self.dtype.itemsize

    @cached_property
    def length(self) -> NDArray[np.int64]:
        """Tokens of each document, its end-of-document token included."""
        return self.column("length")

    @cached_property
    def sound_index(self) -> Path:
        """The index, once its bytes are known to be those that the manifest promises."""
        try:
            found = sha256_of(self.index)
        except OSError as error:
            raise DataError(
                f"index {self.index} cannot be read ({error}): copy it again, or build the data set again"
            ) from error
        if found != self.entry.index_sha256:
            raise DataError(
                f"index {self.index} is not the one that was written (sha256 {found[:12]}, and the manifest says "
                f"{self.entry.index_sha256[:12]}): copy it again, or build the data set again"
            )
        return self.index

    def column(self, name: str) -> NDArray[np.int64]:
        """A column of the index: offset (bytes), length (tokens), crc32, text_bytes, id_bytes, id_ends.

        Where documents are raw text, `length` is in bytes, and `is_json` is 1 for those that are JSON objects.
        """
        try:
            with safe_open(self.sound_index, framework="numpy") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"index {self.index} cannot be read ({error}): copy it again, or build the data set again"
            ) from error

    @cached_property
    def _id_columns(self) -> tuple[bytes, NDArray[np.int64]]:
        return self.column("id_bytes").tobytes(), self.column("id_ends")

    def document_id(self, number: int) -> str:
        text, ends = self._id_columns
        return text[ends[number - 1] if number else 0 : ends[number]].decode()

    def number_of(self, document: str) -> int | None:
        """The number of the document of that id; None if it is not in this shard."""
        text, ends = self._id_columns
        wanted, at = document.encode(), -1
        while (at := text.find(wanted, at + 1)) >= 0:
            number = int(ends.searchsorted(at, side="right"))
            if number < len(ends) and ends[number] == at + len(wanted) and at == (ends[number - 1] if number else 0):
                return number
        return None

    def tokens(self, number: int) -> Tokens:
        """The ids of a document [length], a view of the mapped file."""
        start = self.start[number]
        return self.ids[start : start + self.length[number]]

    def damaged(self, number: int) -> bool:
        """The document's bytes are not those that were written."""
        return zlib.crc32(self.tokens(number).data) != self._crc32[number]

    @cached_property
    def _crc32(self) -> NDArray[np.int64]:
        return self.column("crc32")

    @cached_property
    def _health(self) -> bytearray:
        return bytearray(len(self.length))

    def damaged_among(self, numbers: list[int]) -> list[bool]:
        """Which of these documents are damaged. Each is checked once.

        All are where the tar is missing or has another size.
        """
        health = self._health
        for number in numbers:
            if health[number] == _UNKNOWN:
                health[number] = _DAMAGED if self.unreadable or self.damaged(number) else _SOUND
        return [health[number] == _DAMAGED for number in numbers]

    @cached_property
    def unreadable(self) -> str:
        """Why the tar cannot be read at all; empty where it can."""
        try:
            self.ids  # noqa: B018
        except DataError as error:
            return str(error)
        return ""


_UNKNOWN, _SOUND, _DAMAGED = 0, 1, 2
