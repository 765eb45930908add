"""Is a data set what was written? Every byte is read once, and nothing in it is trusted, unpacked or run.

The manifest says what each file must be; the index must agree with the tar, and the tar must be one of ours: plain
files with plain names. So a shard from elsewhere that carries a link, a device, a pickle or a header that claims a
petabyte is named, and that is all that happens to it.
"""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatrain.base.errors import DataError
from megatrain.base.files import sha256_of
from megatrain.data.encoding import ordered_map
from megatrain.data.manifest import MANIFEST, Manifest, ShardEntry
from megatrain.data.shards import Shard
from megatrain.data.tokenizer import Tokenizer

_BLOCK = 512
_KINDS = {  # the type byte of a tar header, POSIX.1-2001 (pax) section "ustar Interchange Format"
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"5": "a folder",
    b"6": "a pipe",
    b"x": "a pax header",
    b"g": "a pax header",
    b"L": "a long name",
    b"K": "a long name",
    b"S": "a sparse file",
}
_MEMBER = re.compile(rb"(\d{9})\.(tokens|json)")
_PATH = re.compile(r"[A-Za-z0-9_]+/shard-\d{6}\.(tar|index)")


@dataclass(frozen=True)
class Fault:
    """A file that is not what it must be."""

    path: str
    """Relative to the data set's folder."""
    what: str


def verify(folder: Path, workers: int = 1) -> Iterator[tuple[str, list[Fault]]]:
    """Check a data set: (the file looked at, what is wrong with it), for the manifest, the tokenizer and each shard.

    Raises:
        DataError: `folder` holds no data set at all.
    """
    if not (folder / MANIFEST).exists():
        Manifest.read(folder)  # says why not
    try:
        manifest = Manifest.read(folder)
    except DataError as error:
        yield MANIFEST, [Fault(MANIFEST, str(error))]
        return
    yield MANIFEST, [Fault(MANIFEST, what) for what in _manifest_faults(manifest)]
    yield (
        manifest.tokenizer.file,
        [Fault(manifest.tokenizer.file, what) for what in _tokenizer_faults(folder, manifest)],
    )
    entries = [entry for split in manifest.splits.values() for entry in split.shards]
    jobs = [_Job(folder, entry, manifest) for entry in entries]
    for entry, faults in zip(entries, ordered_map(_shard_faults, jobs, workers), strict=True):
        yield entry.path, faults
    listed = {path for entry in entries for path in (entry.path, entry.index)}
    for path in sorted(folder.glob("*/shard-*")):
        if (name := path.relative_to(folder).as_posix()) not in listed:
            yield name, [Fault(name, "the manifest does not list this file, so it is not trained on")]


@dataclass(frozen=True)
class _Job:
    folder: Path
    entry: ShardEntry
    manifest: Manifest


def _manifest_faults(manifest: Manifest) -> Iterator[str]:
    seen: set[str] = set()
    contents: dict[str, str] = {}
    for split in manifest.splits.values():
        for entry in split.shards:
            if entry.path in seen:
                yield f"lists {entry.path} twice"
            seen.add(entry.path)
            if entry.documents and contents.setdefault(entry.sha256, entry.path) != entry.path:
                yield f"lists {contents[entry.sha256]} and {entry.path}, which have the same content"


def _tokenizer_faults(folder: Path, manifest: Manifest) -> Iterator[str]:
    wanted = manifest.tokenizer
    path = folder / wanted.file
    if Path(wanted.file).name != wanted.file:
        yield "its path leads out of the data set"
        return
    if not path.is_file():
        yield "is missing"
        return
    if (found := sha256_of(path)) != wanted.fingerprint:
        yield f"sha256 is {found} and the manifest says {wanted.fingerprint}"
        return
    try:
        tokenizer = Tokenizer.open(path, wanted.end_of_document)
    except DataError as error:
        yield str(error)
        return
    if tokenizer.vocab_size != wanted.vocab_size:
        yield f"has {tokenizer.vocab_size} tokens and the manifest says {wanted.vocab_size}"


def _shard_faults(job: _Job) -> list[Fault]:
    entry = job.entry
    for path in (entry.path, entry.index):
        if not _PATH.fullmatch(path):
            return [Fault(path, "is no name of a shard (SPLIT/shard-000000.tar and .index)")]
    faults = [
        *_file_faults(job.folder, entry.path, entry.sha256, entry.bytes),
        *_file_faults(job.folder, entry.index, entry.index_sha256, None),
    ]
    if any(fault.what == "is missing" for fault in faults):
        return faults
    try:
        faults += [Fault(entry.path, what) for what in _content_faults(job)]
    except (DataError, ValueError, IndexError, OverflowError) as error:  # an index that is not one of ours
        faults.append(Fault(entry.index, f"does not fit the tar ({error})"))
    return faults


def _file_faults(folder: Path, name: str, sha256: str, size: int | None) -> Iterator[Fault]:
    path = folder / name
    if path.is_symlink():
        yield Fault(name, "is a link: copy the file itself")
    if not path.is_file():
        yield Fault(name, "is missing")
        return
    if size is not None and (found_size := path.stat().st_size) != size:
        yield Fault(name, f"has {found_size} bytes and the manifest says {size}")
    if (found := sha256_of(path)) != sha256:
        yield Fault(name, f"sha256 is {found} and the manifest says {sha256}")


def _content_faults(job: _Job) -> Iterator[str]:
    """What is wrong inside a shard: the members of the tar, its index, and the ids of each document."""
    entry, shard = job.entry, Shard.of(job.folder, job.entry, job.manifest.dtype)
    content = np.memmap(shard.tar, dtype=np.uint8, mode="r") if shard.tar.stat().st_size else np.zeros(0, np.uint8)
    offset, length = shard.column("offset"), shard.column("length")
    members: dict[int, int] = {}
    for found in _members(content):
        if isinstance(found, str):
            yield found
            return  # where one member is not as it must be, the next header cannot be trusted
        members[found[0]] = found[1]
    item = np.dtype(job.manifest.dtype).itemsize
    if members != dict(zip(offset.tolist(), (length * item).tolist(), strict=True)):
        yield f"holds {len(members)} documents at other places than the {len(offset)} of its index"
        return
    for name, wanted, got in (
        ("documents", entry.documents, len(offset)),
        ("tokens", entry.tokens, int(length.sum())),
        ("bytes of text", entry.text_bytes, int(shard.column("text_bytes").sum())),
    ):
        if wanted != got:
            yield f"has {got} {name} and the manifest says {wanted}"
    yield from _document_faults(shard, content, job.manifest)


def _members(content: NDArray[np.uint8]) -> Iterator[tuple[int, int] | str]:
    """Offset and size of each `.tokens` member, or a sentence about the first member that is not one of ours."""
    at = 0
    while True:
        header = content[at : at + _BLOCK].tobytes()
        if len(header) < _BLOCK:
            yield f"ends at byte {at} without the end of a tar"
            return
        if not any(header):
            break
        name = header[:100].rstrip(b"\0")
        if (why := _header_fault(header, name)) is not None:
            yield f"the member {name.decode('utf-8', 'replace')!r} at byte {at} {why}"
            return
        size = int(header[124:135], 8)
        begin = at + _BLOCK
        at = begin + -(-size // _BLOCK) * _BLOCK
        if at > len(content):
            yield f"the member {name.decode()!r} has {size} bytes and the tar ends before"
            return
        if name.endswith(b".tokens"):
            yield begin, size
    if content[at:].any():
        yield f"goes on after its end at byte {at}"


def _header_fault(header: bytes, name: bytes) -> str | None:
    """Why this header is not that of a document of ours; None if it is."""
    counted = header[:148] + b" " * 8 + header[156:]  # the checksum counts its own field as spaces
    try:
        if int(header[148:156].split(b"\0")[0], 8) != sum(counted):
            return "has a damaged header"
    except ValueError:
        return "has no tar header"
    kind = header[156:157]
    if kind not in (b"0", b"\0"):
        return f"is {_KINDS.get(kind, 'of an unknown kind')}: a shard holds plain files only"
    if header[345:500].strip(b"\0") or not _MEMBER.fullmatch(name):
        return "has a name that no member of a shard has (000000000.tokens and .json)"
    if not re.fullmatch(rb"[0-7]{11}[\0 ]", header[124:136]):
        return "has a size that is no octal number"
    return None


def _document_faults(shard: Shard, content: NDArray[np.uint8], manifest: Manifest) -> Iterator[str]:
    crc, offset, length = shard.column("crc32"), shard.column("offset"), shard.column("length")
    damaged, too_large, no_end = [], [], []
    for number in range(len(offset)):
        payload = content[offset[number] : offset[number] + length[number] * shard.dtype.itemsize]
        if zlib.crc32(payload.tobytes()) != crc[number]:
            damaged.append(number)
            continue
        ids = payload.view(shard.dtype)
        if not len(ids) or ids[-1] != manifest.tokenizer.end_of_document:
            no_end.append(number)
        if len(ids) and ids.max() >= manifest.tokenizer.vocab_size:
            too_large.append(number)
    for numbers, what in (
        (damaged, "do not have the bytes that were written"),
        (too_large, f"hold ids that are not in the vocabulary of {manifest.tokenizer.vocab_size}"),
        (no_end, "do not end with the end-of-document token"),
    ):
        if numbers:
            named = ", ".join(repr(shard.document_id(n)) for n in numbers[:3])
            yield f"{len(numbers)} documents {what}: {named}{', ...' if len(numbers) > 3 else ''}"
