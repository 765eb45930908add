"""Files as blocks of bytes, decompressed on the way. A compressed file that was cut is an error, never a short file."""

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from megatrain.base.errors import DataError

_BLOCK = 2**18

COMPRESSIONS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),  # 31: a gzip header
    ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
}


def read_blocks(path: Path, block_bytes: int = _BLOCK) -> Iterator[tuple[bytes, int]]:
    """The content of `path` in blocks of at most `block_bytes` on disk, with the bytes on disk that each stands for.

    Raises:
        DataError: the file is compressed and damaged or cut.
    """
    block_bytes = min(block_bytes, _BLOCK)
    make = COMPRESSIONS.get(path.suffix.lower())
    with open(path, "rb") as file:
        if make is None:
            while block := file.read(block_bytes):
                yield block, len(block)
            return
        frame = None
        while block := file.read(block_bytes):
            size = len(block)
            while block:  # a file may hold several compressed frames, one after the other
                frame = frame or make()
                try:
                    content = frame.decompress(block)
                except (zlib.error, zstandard.ZstdError) as error:
                    raise DataError(f"{path} is damaged ({error}): get the file again") from error
                block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
                yield content, size
                size = 0
        if frame is not None:
            raise DataError(f"{path} is cut: its {path.suffix} data does not end; get the file again")


def read_whole(path: Path) -> bytes:
    return b"".join(block for block, _ in read_blocks(path))
