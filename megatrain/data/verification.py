"""Is a data set what was written? Every byte is read once, and nothing in it is trusted, unpacked or run.

The manifest says what each file must be; the index must agree with the tar, and the tar must be one of ours: plain
files with plain names. So a shard from elsewhere that carries a link, a device, a pickle or a header that claims a
petabyte is named, and that is all that happens to it.
"""

import hashlib
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatrain.base.errors import DataError
from megatrain.base.files import sha256_of
from megatrain.data.corpus import Access, read_manifest
from megatrain.data.encoding import ordered_map
from megatrain.data.manifest import MANIFEST, Manifest, ShardEntry, Split, check_paths
from megatrain.data.remote import RemoteShard
from megatrain.data.shards import Shard
from megatrain.data.store import Store, is_remote, read_whole
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
_PATH = re.compile(r"(\.megatrain/)?[A-Za-z0-9_]+/shard-\d{6}\.(tar|index)")


@dataclass(frozen=True)
class Fault:
    """A file that is not what it must be."""

    path: str
    """Relative to the data set's folder."""
    what: str


def verify(address: str, workers: int = 1, access: Access | None = None) -> Iterator[tuple[str, list[Fault]]]:
    """Check a data set: (the file looked at, what is wrong with it), for the manifest, the tokenizer and each shard.

    What is remote is copied to the cache, whose copies are checked.

    Raises:
        DataError: there is no data set at all at `address`.
    """
    access = access or Access()
    if not is_remote(address) and not (Path(address) / MANIFEST).exists():
        Manifest.read(Path(address))  # says why not
    store = access.store(address)
    try:
        manifest = read_manifest(address, store)
    except DataError as error:
        yield MANIFEST, [Fault(MANIFEST, str(error))]
        return
    yield MANIFEST, [Fault(MANIFEST, what) for what in _manifest_faults(manifest)]
    name = manifest.tokenizer.file
    yield name, [Fault(name, what) for what in _tokenizer_faults(address, store, manifest)]
    jobs = [
        _Job(address, access, entry, split, manifest) for split in manifest.splits.values() for entry in split.shards
    ]
    for job, faults in zip(jobs, ordered_map(_shard_faults, jobs, workers), strict=True):
        yield job.entry.path, faults
    if store is None:
        yield from _strays(Path(address), {path for job in jobs for path in (job.entry.path, job.entry.index)})


def _strays(folder: Path, listed: set[str]) -> Iterator[tuple[str, list[Fault]]]:
    for path in sorted([*folder.glob("*/shard-*"), *folder.glob(".megatrain/*/*")]):
        if (name := path.relative_to(folder).as_posix()) not in listed:
            yield name, [Fault(name, "the manifest does not list this file, so it is not trained on")]


@dataclass(frozen=True)
class _Job:
    address: str
    access: Access
    entry: ShardEntry
    split: Split
    manifest: Manifest

    def shard(self) -> Shard:
        """The shard's files on this machine, not looked at yet.

        Raises:
            DataError: a remote one is twice not what the manifest promises.
        """
        dtype = "uint8" if self.split.is_text else self.manifest.dtype
        store = self.access.store(self.address)
        if store is None:
            return Shard.of(Path(self.address), self.entry, dtype)
        check_paths(self.entry, store.name)
        remote = RemoteShard(store, self.entry, dtype, self.access.cache)
        remote.fetch()
        return Shard(remote.tar, remote.sound_index, self.entry, dtype)


def _manifest_faults(manifest: Manifest) -> Iterator[str]:
    for split in manifest.splits.values():  # text files may be in several, each with other documents
        seen: set[str] = set()
        contents: dict[str, str] = {}
        for entry in split.shards:
            if entry.path in seen:
                yield f"lists {entry.path} twice"
            seen.add(entry.path)
            if entry.documents and contents.setdefault(entry.sha256, entry.path) != entry.path:
                yield f"lists {contents[entry.sha256]} and {entry.path}, which have the same content"


def _tokenizer_faults(address: str, store: Store | None, manifest: Manifest) -> Iterator[str]:
    wanted = manifest.tokenizer
    if Path(wanted.file).name != wanted.file:
        yield "its path leads out of the data set"
        return
    if store is None and not (Path(address) / wanted.file).is_file():
        yield "is missing"
        return
    try:
        content = read_whole(store, wanted.file) if store is not None else (Path(address) / wanted.file).read_bytes()
        if (found := hashlib.sha256(content).hexdigest()) != wanted.fingerprint:
            yield f"sha256 is {found} and the manifest says {wanted.fingerprint}"
            return
        tokenizer = Tokenizer.parse(content, wanted.file, wanted.end_of_document)
    except DataError as error:
        yield str(error)
        return
    if tokenizer.vocab_size != wanted.vocab_size:
        yield f"has {tokenizer.vocab_size} tokens and the manifest says {wanted.vocab_size}"


def _shard_faults(job: _Job) -> list[Fault]:
    entry = job.entry
    for path in (entry.path, entry.index):
        if not job.split.is_text and not _PATH.fullmatch(path):
            return [Fault(path, "is no name of a shard (SPLIT/shard-000000.tar and .index)")]
    try:
        shard = job.shard()
    except DataError as error:
        return [Fault(entry.path, str(error))]
    faults = [
        *_file_faults(entry.path, shard.tar, entry.sha256, entry.bytes),
        *_file_faults(entry.index, shard.index, entry.index_sha256, None),
    ]
    if any(fault.what == "is missing" for fault in faults):
        return faults
    find = _text_faults if job.split.is_text else _content_faults
    try:
        faults += [Fault(entry.path, what) for what in find(job, shard)]
    except (DataError, ValueError, IndexError, OverflowError) as error:  # an index that is not one of ours
        faults.append(Fault(entry.index, f"does not fit the tar ({error})"))
    return faults


def _file_faults(name: str, path: Path, sha256: str, size: int | None) -> Iterator[Fault]:
    if path.is_symlink():
        yield Fault(name, "is a link: copy the file itself")
    if not path.is_file():
        yield Fault(name, "is missing")
        return
    if size is not None and (found_size := path.stat().st_size) != size:
        yield Fault(name, f"has {found_size} bytes and the manifest says {size}")
    if (found := sha256_of(path)) != sha256:
        yield Fault(name, f"sha256 is {found} and the manifest says {sha256}")


def _text_faults(job: _Job, shard: Shard) -> Iterator[str]:
    """Which documents of raw text are not those that were indexed."""
    if shard.unreadable:
        yield shard.unreadable
        return
    if len(shard.length) != job.entry.documents or int(shard.length.sum()) != job.entry.text_bytes:
        yield f"has {len(shard.length)} documents in its index and the manifest says {job.entry.documents}"
    damaged = [number for number in range(len(shard.length)) if shard.damaged(number)]
    if damaged:
        yield _named(shard, damaged, "do not have the bytes that were indexed")


def _content_faults(job: _Job, shard: Shard) -> Iterator[str]:
    """What is wrong inside a shard: the members of the tar, its index, and the ids of each document."""
    entry = job.entry
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
            yield _named(shard, numbers, what)


def _named(shard: Shard, numbers: list[int], what: str) -> str:
    named = ", ".join(repr(shard.document_id(n)) for n in numbers[:3])
    return f"{len(numbers)} documents {what}: {named}{', ...' if len(numbers) > 3 else ''}"
