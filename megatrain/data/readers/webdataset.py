"""Tars of text in webdataset's layout: members that stand together and differ only after the first dot are a sample.

A sample's `.txt` is its document; without one, the text under a key of its `.json`. Other members are not looked at.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import ClassVar

from megatrain.base.errors import DataError
from megatrain.data.documents import CHUNK_BYTES, READER, Document, Refused, Source, document_of, document_of_json
from megatrain.data.tar import Member, members

_LARGEST = 2**26  # bytes of a member: more is no text that someone wrote


@READER.register("webdataset")
@dataclass(frozen=True)
class WebDataset:
    text_field: str = "text"
    """Key of the text in a sample's .json."""
    id_field: str | None = None
    chunk_bytes: int = CHUNK_BYTES

    suffixes: ClassVar[tuple[str, ...]] = (".tar",)

    def chunks(self, sources: Sequence[Source]) -> Iterator["Samples"]:
        for source in sources:
            if source.path.suffix.lower() != ".tar":
                raise DataError(
                    f"{source.path} is a compressed tar, which cannot be entered at a member: decompress it"
                )
            with open(source.path, "rb") as file:
                yield from self._cut(source, members(file, str(source.path)))

    def _cut(self, source: Source, found: Iterable[Member]) -> Iterator["Samples"]:
        group: list[Sample] = []
        done = 0
        for key, parts in groupby(found, key=lambda member: split_name(member.name)[0]):
            sample = Sample.of(f"{source.name}/{key}", list(parts))
            group.append(sample)
            if sample.end - done >= self.chunk_bytes:
                yield self._samples(source, group, sample.end - done)
                group, done = [], sample.end
        yield self._samples(source, group, source.size - done)

    def _samples(self, source: Source, group: list["Sample"], size: int) -> "Samples":
        return Samples(source.path, tuple(group), size, self.text_field, self.id_field)


def split_name(name: str) -> tuple[str, str]:
    """What comes before the first dot of the last part of a name, and what after it.

    >>> split_name("en/0001.en.txt")
    ('en/0001', 'en.txt')
    """
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension.lower()


@dataclass(frozen=True)
class Sample:
    """Where the text of a sample lies, or why there is none."""

    id: str
    end: int
    """Of its last member in the tar."""
    member: Member | None
    is_json: bool = False
    reason: str = ""

    @classmethod
    def of(cls, id: str, parts: list[Member]) -> "Sample":
        end = parts[-1].offset + parts[-1].size
        for extension in ("txt", "json"):
            for part in parts:
                if split_name(part.name)[1] != extension:
                    continue
                if not part.plain:
                    return cls(id, end, None, reason="a link or a device in a tar")
                if part.size > _LARGEST:
                    return cls(id, end, None, reason=f"larger than {_LARGEST >> 20} MiB")
                return cls(id, end, part, extension == "json")
        return cls(id, end, None, reason="no .txt and no .json in its sample")


@dataclass(frozen=True)
class Samples:
    path: Path
    samples: tuple[Sample, ...]
    size: int
    text_field: str
    id_field: str | None

    def documents(self) -> Iterator[Document | Refused]:
        with open(self.path, "rb") as file:
            for sample in self.samples:
                if sample.member is None:
                    yield Refused(sample.id, sample.reason)
                    continue
                file.seek(sample.member.offset)
                content = file.read(sample.member.size)
                if sample.is_json:
                    yield document_of_json(sample.id, content, self.text_field, self.id_field)
                else:
                    yield document_of(sample.id, content)
