"""JSON lines: an object a line, its text under one key."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from megatrain.data.compression import read_blocks
from megatrain.data.documents import CHUNK_BYTES, READER, Document, Refused, Source, document_of_json


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
                yield document_of_json(f"{self.name}:{number}", line, self.text_field, self.id_field)
