"""Documents and where they come from: the seam between the readers of file formats and what is done with the text."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from megatrain.base.registry import Registry

CHUNK_BYTES = 2**20
"""How much text a chunk holds unless told: enough to keep a process busy, little enough to hold many in memory."""


@dataclass(frozen=True)
class Source:
    """A file to read. `name` starts the ids of its documents: it is the same wherever the files are copied to."""

    path: Path
    name: str
    size: int
    """Bytes on disk."""


@dataclass(frozen=True)
class Document:
    """A piece of text that belongs together, or the ids of one where the format holds ids."""

    id: str
    text: str = ""
    tokens: NDArray[np.uint32] | None = None


@dataclass(frozen=True)
class Refused:
    """What could not be made a document, and why, in words that can be counted."""

    id: str
    reason: str


class Chunk(Protocol):
    """Some of the input, small enough to send to another process, which makes the documents of it."""

    @property
    def size(self) -> int:
        """Bytes on disk that this chunk stands for; over all chunks they add up to the input."""
        ...

    def documents(self) -> Iterator[Document | Refused]:
        """The documents, always the same ones in the same order."""
        ...


class Reader(Protocol):
    """Reads one file format. A reader is a frozen dataclass: its fields are the options of the format.

    One that has a field `chunk_bytes` makes chunks of about so many bytes of text.
    """

    suffixes: ClassVar[tuple[str, ...]]
    """Ends of the file names it reads, without a compression's; none for the reader of everything else."""

    def chunks(self, sources: Sequence[Source]) -> Iterator[Chunk]:
        """All of `sources` in order, cut always the same way."""
        ...


READER: Registry[Any] = Registry("reader", "megatrain.data.readers")


def as_text(content: bytes) -> str | None:
    """`content` as text, without a byte order mark; None if it is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def document_of_json(id: str, content: bytes, text_field: str, id_field: str | None) -> Document | Refused:
    """The document in a JSON object, or why there is none."""
    decoded = as_text(content)
    if decoded is None:
        return Refused(id, "not UTF-8")
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError):
        return Refused(id, "not JSON")
    text = record.get(text_field) if isinstance(record, dict) else None
    if id_field is not None and isinstance(record, dict) and isinstance(record.get(id_field), str | int):
        id = str(record[id_field])
    if not isinstance(text, str):
        return Refused(id, f"no text under {text_field!r}")
    try:
        (id + text).encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        return Refused(id, "not UTF-8")
    return Document(id, text) if text.strip() else Refused(id, "empty")


def document_of(id: str, content: bytes) -> Document | Refused:
    """The document that these bytes are, or why they are none."""
    if b"\0" in content:
        return Refused(id, "binary")
    text = as_text(content)
    if text is None:
        return Refused(id, "not UTF-8")
    return Document(id, text) if text.strip() else Refused(id, "empty")
