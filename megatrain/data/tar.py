"""Tars: members as webdataset writes them, byte for byte and many times as fast; and where the members of any tar lie.

A build writes a member for each document in one process; there Python's tarfile, which webdataset uses, would hold up
many processes that encode. Reading looks at headers only, unpacks nothing, follows nothing, and holds little in memory
whatever a header claims. The formats are ustar and pax of POSIX.1-2001, and GNU's long names.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from megatrain.base.errors import DataError

BLOCK = 512
"""Headers and contents are aligned to blocks of this many bytes."""
_RECORD = 20 * BLOCK  # a whole tar is aligned to records
_LARGEST = 8**11 - 1  # what a size of eleven octal digits can say
_LONGEST_HEADER = 2**16  # bytes of an extended header or a long name: what a file system's names need, many times over

_MODE_AND_OWNER = b"0000444\0" + b"0000000\0" * 2
_MTIME = b"00000000000\0"  # no time stamp and no owner: the same documents give the same bytes
_REST = b"0" + bytes(100) + b"ustar\x0000" + bytes(247)  # a plain file, no link, the magic, nobody's


def member(name: bytes, content: bytes) -> bytes:
    """A file in a tar: its header, its content, and zeros up to a block.

    Raises:
        ValueError: the name or the content is longer than a plain header can say.
    """
    if len(name) > 100 or len(content) > _LARGEST:
        raise ValueError(f"a member of {len(content)} bytes with a name of {len(name)} needs more than a plain header")
    before = name.ljust(100, b"\0") + _MODE_AND_OWNER + b"%011o\0" % len(content) + _MTIME
    checksum = sum(before) + sum(_REST) + 8 * ord(" ")  # the field itself counts as spaces
    padding = bytes(-len(content) % BLOCK)
    return b"".join((before, b"%06o\0 " % checksum, _REST, content, padding))


def end(size: int) -> bytes:
    """What ends a tar of `size` bytes: two empty blocks, and zeros up to a record."""
    return bytes(2 * BLOCK + -(size + 2 * BLOCK) % _RECORD)


@dataclass(frozen=True)
class Member:
    """A member of a tar that someone else made."""

    name: str
    """As the tar has it: never to be used as a path."""
    offset: int
    """Of its content in the tar, bytes."""
    size: int
    plain: bool
    """A file; and not a folder, a link, a device or anything else."""


def members(file: BinaryIO, origin: str) -> Iterator[Member]:
    """The members of the tar in `file`, which can seek; `origin` names it in errors.

    Raises:
        DataError: it is cut or damaged, no tar at all, or a header claims what no honest tar needs.
    """
    total = os.fstat(file.fileno()).st_size
    at = 0
    extended: dict[str, bytes] = {}  # what an extended header says of the next member
    while True:
        file.seek(at)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            raise DataError(f"{origin} is no whole tar: it ends at byte {at} without an end; get the file again")
        if not any(header):
            return
        size = _size(header, at, origin)
        kind, begin = header[156:157], at + BLOCK
        if kind in b"xLK" and (size > _LONGEST_HEADER or begin + size > total):
            raise DataError(
                f"{origin} has a header of {size} bytes at byte {at}, which no honest tar needs: do not use it"
            )
        if kind == b"x":
            extended |= _pax(file.read(size), at, origin)
        elif kind == b"L":
            extended["path"] = file.read(size).rstrip(b"\0")
        elif kind not in b"gK":
            size = int(extended.get("size", size))
            if begin + size > total:
                raise DataError(f"{origin} is cut: a member at byte {at} has {size} bytes; get the file again")
            name = extended.get("path") or _name(header)
            yield Member(name.decode("utf-8", "backslashreplace"), begin, size, kind in (b"0", b"\0", b"7"))
            extended = {}
        at = begin + -(-size // BLOCK) * BLOCK


def _size(header: bytes, at: int, origin: str) -> int:
    """The size in a header whose checksum is right."""
    try:
        wrong = int(header[148:156].strip(b" \0"), 8) != sum(header[:148]) + sum(header[156:]) + 8 * ord(" ")
        field = header[124:136]
        is_binary = field[0] & 0x80  # GNU's, where octal digits are too few
        size = int.from_bytes(field, "big") & (1 << 95) - 1 if is_binary else int(field.strip(b" \0") or b"0", 8)
        wrong |= size < 0
    except ValueError:
        wrong = True
    if wrong:
        raise DataError(f"{origin} has no sound tar header at byte {at}: it is damaged or no tar; get the file again")
    return size


def _name(header: bytes) -> bytes:
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    return prefix + b"/" + name if header[257:263] == b"ustar\0" and prefix else name


def _pax(content: bytes, at: int, origin: str) -> dict[str, bytes]:
    """The records of an extended header that matter: lines "LENGTH KEY=VALUE"."""
    found = {}
    while content.strip(b"\0"):
        line = re.match(rb"(\d{1,6}) ([^=]{1,200})=", content)
        length = int(line[1]) if line else 0
        if line is None or not line.end() < length <= len(content) or content[length - 1 : length] != b"\n":
            raise DataError(f"{origin} has a damaged extended header at byte {at}: get the file again")
        key, value = line[2].decode("utf-8", "replace"), content[line.end() : length - 1]
        if key == "path" or (key == "size" and value.isdigit() and len(value) < 20):
            found[key] = value
        content = content[length:]
    return found
