"""Parquet tables, a document a row. Read through pyarrow where it is installed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from megatrain.base.errors import DataError, did_you_mean
from megatrain.base.optional import optional
from megatrain.data.documents import READER, Document, Refused, Source


@READER.register("parquet")
@dataclass(frozen=True)
class Parquet:
    text_field: str = "text"
    """Column of the text."""
    id_field: str | None = None
    """Column of ids to know the documents by; without one they are FILE:ROW."""

    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)

    def chunks(self, sources: Sequence[Source]) -> Iterator["RowGroup"]:
        for source in sources:
            file = _open(source.path)
            columns = file.schema_arrow.names
            for column in (self.text_field, self.id_field):
                if column is not None and column not in columns:
                    raise DataError(f"{source.path} has no column {column!r}: {did_you_mean(column, columns)}")
            first, left = 0, source.size
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                last = number == file.num_row_groups - 1
                size = left if last else min(left, _bytes_of(group))
                yield RowGroup(source.path, source.name, number, first, size, self.text_field, self.id_field)
                first, left = first + group.num_rows, left - size


def _bytes_of(group: Any) -> int:
    return sum(group.column(i).total_compressed_size for i in range(group.num_columns))


def _open(path: Path) -> Any:
    parquet = optional("pyarrow.parquet")
    if not parquet:
        raise DataError(
            f"{path} is a parquet file and pyarrow cannot be used ({parquet.why_not}): pip install 'megatrain[parquet]'"
        )
    try:
        return parquet.ParquetFile(path)
    except optional("pyarrow").ArrowException as error:
        raise DataError(f"{path} is no whole parquet file ({error}): get the file again") from error


@dataclass(frozen=True)
class RowGroup:
    """The part of a file that parquet compresses together; `first` is the number of its first row in the file."""

    path: Path
    name: str
    number: int
    first: int
    size: int
    text_field: str
    id_field: str | None

    def documents(self) -> Iterator[Document | Refused]:
        fields = [self.text_field] if self.id_field is None else [self.text_field, self.id_field]
        try:
            table = _open(self.path).read_row_group(self.number, columns=fields, use_threads=False)
        except (optional("pyarrow").ArrowException, OSError) as error:
            raise DataError(f"{self.path} is damaged ({error}): get the file again") from error
        texts = table.column(self.text_field)
        ids = None if self.id_field is None else table.column(self.id_field)
        for row in range(len(texts)):
            id = f"{self.name}:{self.first + row}" if ids is None else str(ids[row].as_py())
            yield _document(id, texts[row], self.text_field)


def _document(id: str, value: Any, field: str) -> Document | Refused:
    try:
        text = value.as_py()
    except UnicodeDecodeError:  # parquet promises UTF-8 and does not check it
        return Refused(id, "not UTF-8")
    if not isinstance(text, str):
        return Refused(id, f"no text under {field!r}")
    return Document(id, text) if text.strip() else Refused(id, "empty")
