"""JSON lines: an object a line, its text under one key."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from megatrain.data.compression import read_blocks
from megatrain.data.documents import CHUNK_BYTES, READER, Document, Refused, Source, as_text


@READER.register("json_lines")
@dataclass(frozen=True)
class JsonLines:
    text_field: str = "text"
    """Key of the text."""
    id_field: str | None = None
    """Key of ids to know the documents by; without one they are FILE:LINE."""
    chunk_bytes: int = CHUNK_BYTES

    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".ndjson")

    def chunks(self, sources: Sequence[Source]) -> Iterator["Lines"]:
        for source in sources:
            first, size = 1, 0
            rest: list[bytes] = []  # blocks without a newline between them: a long line is joined once
            held = 0
            for block, on_disk in read_blocks(source.path, self.chunk_bytes):
                size, held = size + on_disk, held + len(block)
                end = block.rfind(b"\n") + 1
                if not end or held < self.chunk_bytes:
                    rest.append(block)
                    continue
                content = b"".join([*rest, block[:end]])
                yield Lines(source.name, first, content, size, self.text_field, self.id_field)
                first, size = first + content.count(b"\n"), 0
                rest, held = [block[end:]], len(block) - end
            yield Lines(source.name, first, b"".join(rest), size, self.text_field, self.id_field)


@dataclass(frozen=True)
class Lines:
    """Lines of a file; the first is line number `first`."""

    name: str
    first: int
    content: bytes
    size: int
    text_field: str
    id_field: str | None

    def documents(self) -> Iterator[Document | Refused]:
        for number, line in enumerate(self.content.split(b"\n"), self.first):
            if line.strip():
                yield self._document(f"{self.name}:{number}", line)

    def _document(self, id: str, line: bytes) -> Document | Refused:
        content = as_text(line)
        if content is None:
            return Refused(id, "not UTF-8")
        try:
            record = json.loads(content)
        except (ValueError, RecursionError):
            return Refused(id, "not JSON")
        text = record.get(self.text_field) if isinstance(record, dict) else None
        if self.id_field is not None and isinstance(record, dict) and isinstance(record.get(self.id_field), str | int):
            id = str(record[self.id_field])
        if not isinstance(text, str):
            return Refused(id, f"no text under {self.text_field!r}")
        try:
            (id + text).encode()
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
            return Refused(id, "not UTF-8")
        return Document(id, text) if text.strip() else Refused(id, "empty")
