"""Plain text and source files: a file is a document; long prose, which is many documents in one file, is cut."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from megatrain.data.compression import read_blocks, read_whole
from megatrain.data.documents import CHUNK_BYTES, READER, Document, Refused, Source, document_of
from megatrain.data.sources import suffix_of

_LARGEST_WHOLE = 2**26  # bytes of a file that is one document: more is data, not text that someone wrote


@READER.register("text")
@dataclass(frozen=True)
class Text:
    """Files of any suffix that no other reader takes."""

    separator: str | None = None
    """What stands between the documents of a .txt file, e.g. "<|endoftext|>"; it is dropped."""
    piece_bytes: int = 2**16
    """Without a separator, a .txt file of more than twice this is cut at blank lines into pieces of about this size."""
    chunk_bytes: int = CHUNK_BYTES

    suffixes: ClassVar[tuple[str, ...]] = ()

    def chunks(self, sources: Sequence[Source]) -> Iterator["Files | Pieces"]:
        group: list[Source] = []
        for source in sources:
            if self._is_cut(source):
                if group:
                    yield Files(tuple(group))
                    group = []
                yield from self._cut(source)
                continue
            group.append(source)
            if sum(s.size for s in group) >= self.chunk_bytes:
                yield Files(tuple(group))
                group = []
        if group:
            yield Files(tuple(group))

    def _is_cut(self, source: Source) -> bool:
        if suffix_of(source.path) != ".txt":
            return False
        return self.separator is not None or source.size > 2 * self.piece_bytes or source.path.suffix != ".txt"

    def _cut(self, source: Source) -> Iterator["Pieces"]:
        number, rest, size = 0, b"", 0
        for block, on_disk in read_blocks(source.path, self.chunk_bytes):
            rest, size = rest + block, size + on_disk
            if len(rest) < self.chunk_bytes:
                continue
            pieces, rest = self._pieces(rest)
            if pieces:
                yield Pieces(source.name, number, tuple(pieces), size)
                number, size = number + len(pieces), 0
        pieces, rest = self._pieces(rest)
        yield Pieces(source.name, number, (*pieces, rest) if rest else tuple(pieces), size)

    def _pieces(self, content: bytes) -> tuple[list[bytes], bytes]:
        """The whole documents in `content`, and what is left."""
        if self.separator is not None:
            *pieces, rest = content.split(self.separator.encode())
            return pieces, rest
        pieces, begin = [], 0
        while len(content) - begin > 2 * self.piece_bytes:
            end = _paragraph_end(content, begin + self.piece_bytes, begin + 2 * self.piece_bytes)
            pieces.append(content[begin:end])
            begin = end
        return pieces, content[begin:]


def _paragraph_end(content: bytes, low: int, high: int) -> int:
    """A good place to cut in [low, high]: after a blank line, or a line, or a space; else before a character."""
    for mark in (b"\n\n", b"\r\n\r\n", b"\n", b" "):
        found = content.find(mark, low, high)
        if found >= 0:
            return found + len(mark)
    while high > low and content[high] & 0xC0 == 0x80:  # a byte that continues a character of UTF-8
        high -= 1
    return high


@dataclass(frozen=True)
class Files:
    """Whole files, each a document."""

    sources: tuple[Source, ...]

    @property
    def size(self) -> int:
        return sum(source.size for source in self.sources)

    def documents(self) -> Iterator[Document | Refused]:
        for source in self.sources:
            if source.size > _LARGEST_WHOLE:
                yield Refused(source.name, f"larger than {_LARGEST_WHOLE >> 20} MiB and not named .txt, to be cut")
                continue
            try:
                content = read_whole(source.path)
            except OSError as error:
                yield Refused(source.name, f"cannot be read: {error.strerror}")
                continue
            yield document_of(source.name, content)


@dataclass(frozen=True)
class Pieces:
    """Pieces of one file, each a document; the first is number `first` of the file."""

    name: str
    first: int
    contents: tuple[bytes, ...]
    size: int

    def documents(self) -> Iterator[Document | Refused]:
        for number, content in enumerate(self.contents, self.first):
            yield document_of(f"{self.name}#{number}", content)
