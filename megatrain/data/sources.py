"""Which files a corpus is made of: folders are walked in sorted order, so that every machine finds the same list."""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from megatrain.base.errors import DataError
from megatrain.data.compression import COMPRESSIONS
from megatrain.data.documents import READER, Chunk, Source
from megatrain.data.manifest import MANIFEST, TEXT_PLACE, TOKENIZER


def find_sources(inputs: Sequence[Path], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[Source]:
    """The files of `inputs`: files themselves, folders in sorted order without hidden files.

    A pattern without a slash is matched against the name of each file and folder on the way, one with a slash against
    the path from the input. `include` chooses files, `exclude` leaves out files and whole folders.

    Raises:
        DataError: an input is missing or cannot be read, or nothing is left.
    """
    found: list[Source] = []
    for prefix, path in zip(_prefixes(inputs), inputs, strict=True):
        if not path.exists():
            raise DataError(f"the input {path} does not exist: give files or folders of text")
        if not os.access(path, os.R_OK):
            raise DataError(f"the input {path} cannot be read: give this user permission to read it")
        if path.is_dir():
            _refuse_data_set(path)
            made = (MANIFEST, TOKENIZER) if (path / TEXT_PLACE).is_dir() else ()  # by an index of its text
            files = _walk(path, PurePosixPath(), include, (*exclude, *made))
            found += [_source(path / relative, prefix + _printable(str(relative))) for relative in files]
        else:
            found.append(_source(path, prefix or _printable(path.name)))
    _refuse_twice(found)
    if not found:
        patterns = "".join(f" --include {p}" for p in include) + "".join(f" --exclude {p}" for p in exclude)
        raise DataError(
            f"no file to read in {', '.join(map(str, inputs))}{' with' + patterns if patterns else ''}: "
            "hidden files do not count; give an input that has some"
        )
    if not any(source.size for source in found):
        raise DataError(f"the input {', '.join(map(str, inputs))} is empty: give files that have text in them")
    return found


def reading_problems(options: Mapping[str, Any]) -> list[str]:
    """What is wrong with options of the readers."""
    if options.get("separator") == "":
        return ["separator is empty: give the text that stands between documents, or leave it out"]
    return []


def chunks_of(sources: Sequence[Source], options: Mapping[str, Any]) -> Iterator[Chunk]:
    """All of `sources`, each through the reader of its suffix, which takes the `options` it knows."""
    readers = {suffix: cls for _, cls in READER.items() for suffix in cls.suffixes}
    (everything_else,) = (cls for _, cls in READER.items() if not cls.suffixes)
    for cls, group in itertools.groupby(sources, key=lambda s: readers.get(suffix_of(s.path), everything_else)):
        known = {field.name for field in fields(cls)}
        try:
            yield from cls(**{k: v for k, v in options.items() if k in known}).chunks(list(group))
        except OSError as error:
            raise DataError(
                f"the input {error.filename} cannot be read ({error.strerror}): allow it, or --exclude it"
            ) from error


def suffix_of(path: Path) -> str:
    """The suffix that tells the format, without a compression's.

    >>> suffix_of(Path("a.jsonl.zst"))
    '.jsonl'
    """
    suffixes = path.suffixes
    if suffixes and suffixes[-1].lower() in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1].lower() if suffixes else ""


def _refuse_data_set(folder: Path) -> None:
    """What a build has made is no text, though some of its files are."""
    if (folder / MANIFEST).is_file() and (folder / TOKENIZER).is_file() and not (folder / TEXT_PLACE).is_dir():
        raise DataError(
            f"{folder} is a data set that was built already: train on it as it is, or give the text it was built from"
        )


def _refuse_twice(sources: Sequence[Source]) -> None:
    known: set[str] = set()
    for source in sources:
        path = os.path.abspath(source.path)
        if path in known:
            raise DataError(f"the inputs hold {source.path} twice: give each file once")
        known.add(path)


def _prefixes(inputs: Sequence[Path]) -> list[str]:
    """What the ids of each input start with: nothing for one folder; otherwise names that keep the inputs apart."""
    if len(inputs) == 1:
        return [""]
    names = [_printable(path.resolve().name) for path in inputs]
    numbered = [name if names.count(name) == 1 else f"{i}:{name}" for i, name in enumerate(names)]
    return [name + "/" if path.is_dir() else name for name, path in zip(numbered, inputs, strict=True)]


def _walk(root: Path, folder: PurePosixPath, include: Sequence[str], exclude: Sequence[str]) -> Iterator[PurePosixPath]:
    try:
        entries = sorted(os.scandir(root / folder), key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        raise DataError(
            f"the folder {root / folder} cannot be read ({error.strerror}): exclude it, or allow it"
        ) from error
    for entry in entries:
        path = folder / entry.name
        if entry.name.startswith(".") or entry.name == "__pycache__" or _matches(path, exclude):
            continue
        if entry.is_dir(follow_symlinks=False):  # a linked folder may lead round in a circle
            yield from _walk(root, path, include, exclude)
        elif entry.is_file() and (not include or _matches(path, include)):
            yield path


def _matches(path: PurePosixPath, patterns: Sequence[str]) -> bool:
    return any(fnmatch(str(path) if "/" in pattern else path.name, pattern.rstrip("/")) for pattern in patterns)


def _source(path: Path, name: str) -> Source:
    return Source(path, name, path.stat().st_size)


def _printable(name: str) -> str:
    """A file's name as valid text: bytes that are not UTF-8 are written as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
