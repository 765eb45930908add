"""What a data set holds: the one file a reader trusts, and checks all others against."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Self

from megatrain.base.errors import DataError
from megatrain.base.files import read_json, write_json

VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
TEXT_PLACE = ".megatrain"
"""Folder beside files of raw text for what is made of them."""
TRAIN, HELD_OUT = "train", "held_out"
TOKENS, TEXT = "tokens", "text"


def token_dtype(vocab_size: int) -> str:
    """The narrowest type that holds every id: "uint16" or "uint32"."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


@dataclass(frozen=True)
class ShardEntry:
    """A shard as the manifest knows it. Paths are relative to the data set's folder. Text has 0 tokens."""

    path: str
    bytes: int
    sha256: str
    documents: int
    tokens: int
    index: str
    index_sha256: str
    text_bytes: int = 0


@dataclass(frozen=True)
class Split:
    """The shards of one split, in order."""

    shards: tuple[ShardEntry, ...] = ()
    form: str = TOKENS
    """TOKENS; or TEXT, which is tokenised when it is read."""
    text_field: str = "text"
    """Key of the text in documents that are JSON objects."""

    @property
    def is_text(self) -> bool:
        return self.form == TEXT

    @property
    def size(self) -> int:
        """What slots share: tokens, or bytes of text."""
        return self.text_bytes if self.is_text else self.tokens

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        """Bytes of UTF-8 text that the tokens stand for: what turns a loss per token into bits per byte."""
        return sum(shard.text_bytes for shard in self.shards)


@dataclass(frozen=True)
class TokenizerEntry:
    """Which tokenizer made the ids. Equal fingerprints mean equal ids for equal text."""

    fingerprint: str
    """sha256 of the tokenizer's file."""
    vocab_size: int
    end_of_document: int
    file: str = TOKENIZER


@dataclass(frozen=True)
class Manifest:
    """What a data set holds: the one file a reader trusts, and checks the others against."""

    name: str
    tokenizer: TokenizerEntry
    dtype: str
    splits: dict[str, Split]
    provenance: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """Changes when any shard does, or their order."""
        parts = [(name, _content(self.splits[name])) for name in sorted(self.splits)]
        return hashlib.sha256(json.dumps([parts, self.tokenizer.fingerprint]).encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        def split(value: Split) -> dict[str, Any]:
            sums = {"documents": value.documents, "tokens": value.tokens, "text_bytes": value.text_bytes}
            form = {"form": value.form, "text_field": value.text_field} if value.is_text else {}
            return {"shards": [dataclasses.asdict(shard) for shard in value.shards], **form, **sums}

        return {
            "version": VERSION,
            "name": self.name,
            "tokenizer": dataclasses.asdict(self.tokenizer),
            "dtype": self.dtype,
            "splits": {name: split(value) for name, value in self.splits.items()},
            "provenance": self.provenance,
        }

    def write(self, folder: Path) -> None:
        """Write it last: a folder without a manifest is not a data set."""
        write_json(folder / MANIFEST, self.as_json())

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The manifest of the data set in `folder`.

        Raises:
            DataError: there is no folder, no manifest, or one of another version or shape.
        """
        if not folder.is_dir():
            raise DataError(
                f"{folder} is no folder: give the path of a data set, or make one with `megatrain data build`"
            )
        path = folder / MANIFEST
        if not path.exists():
            raise DataError(
                f"{folder} has no {MANIFEST}, so it is not a finished data set: build it (again) with "
                f"`megatrain data build ... --out {folder}`"
            )
        try:
            return cls.parse(read_json(path), str(path))
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is not JSON ({error}): restore it, or build the data set again") from error

    @classmethod
    def parse(cls, value: Any, origin: str) -> Self:
        """A manifest from its JSON value; `origin` names it in errors."""
        version = value.get("version") if isinstance(value, dict) else None
        if version != VERSION:
            raise DataError(
                f"{origin} has version {version!r} and this program reads version {VERSION}: build the data set again, "
                "or use the program that wrote it"
            )
        try:
            splits = {
                name: _only_fields(
                    Split, split | {"shards": tuple(_only_fields(ShardEntry, shard) for shard in split["shards"])}
                )
                for name, split in value["splits"].items()
            }
            tokenizer = _only_fields(TokenizerEntry, value["tokenizer"])
            found = cls(value["name"], tokenizer, value["dtype"], splits, value.get("provenance", {}))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{origin} is not a manifest ({error!r}): restore it, or build the data set again"
            ) from error
        if found.dtype not in ("uint16", "uint32"):
            raise DataError(
                f"{origin} has dtype {found.dtype!r}: allowed are uint16 and uint32; build the data set again"
            )
        for split in splits.values():
            if split.form not in (TOKENS, TEXT):
                raise DataError(f"{origin} has a split of form {split.form!r}: allowed are {TOKENS} and {TEXT}")
        return found


def _content(split: Split) -> list[Any]:
    if split.is_text:  # which parts of the files are documents is part of what is read
        return [split.text_field, *([shard.sha256, shard.index_sha256] for shard in split.shards)]
    return [shard.sha256 for shard in split.shards]


def _only_fields(cls: Any, value: dict[str, Any]) -> Any:
    """A `cls` from the keys it knows, so that a manifest may say more than we read."""
    known = {f.name for f in dataclasses.fields(cls)}
    return cls(**{k: v for k, v in value.items() if k in known})


def check_paths(entry: ShardEntry, origin: str) -> None:
    """Refuse a shard whose files are not inside its data set."""
    for path in (entry.path, entry.index):
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise DataError(f"the manifest of {origin} names {path!r}, outside its folder: do not use it")
