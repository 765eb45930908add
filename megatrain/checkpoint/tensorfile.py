"""Safetensors files: the header, written and read without trust in what it says.

A file is 8 bytes with the header's length (little-endian), the header in JSON, then the tensors without gaps. The
header is read here and not by a library, so that a lying one is refused before memory is taken for it.
"""

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from megatrain.base.errors import FailedCheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER_BYTES = 8 * 2**20
"""A longer header is refused: parsed JSON takes about ten times its bytes, and real models need less than a tenth."""

MAX_TENSORS = 16_384
"""Tensors in one file of ours, so that its header stays below the limit."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a file. `begin` and `end` are bytes from the end of the header."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def encode_header(entries: Iterable[Entry], metadata: dict[str, str]) -> bytes:
    """The length and the header, padded with blanks so that the tensors begin on a multiple of 8."""
    table: dict[str, Any] = {"__metadata__": metadata}
    for e in entries:
        table[e.key] = {"dtype": DTYPE_NAMES[e.dtype], "shape": list(e.shape), "data_offsets": [e.begin, e.end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def header_length(first_bytes: bytes, file_bytes: int, where: str) -> int:
    """The header's length from the first 8 bytes of a file.

    Raises:
        FailedCheckpointError: it cannot be true, or it is larger than any header may be.
    """
    if len(first_bytes) < 8:
        raise FailedCheckpointError(
            f"{where} has {file_bytes} bytes: it is cut off, a safetensors file has at least 10"
        )
    (length,) = struct.unpack("<Q", first_bytes[:8])
    allowed = min(MAX_HEADER_BYTES, file_bytes - 8)
    if not 2 <= length <= allowed:
        raise FailedCheckpointError(
            f"{where} claims a header of {length} bytes: at most {allowed} are possible; it is damaged"
        )
    return length


def decode_header(text: bytes, data_bytes: int, where: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors and the metadata that a header lists.

    Args:
        data_bytes: bytes in the file after the header; the tensors must fill them exactly.

    Raises:
        FailedCheckpointError: anything in it is not as the format says.
    """
    try:
        table = json.loads(text, object_pairs_hook=_without_duplicates)
        if not isinstance(table, dict):
            raise ValueError("the header is no mapping")
        metadata = table.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("the metadata is no mapping of texts")
        entries = {key: _entry(key, value) for key, value in table.items()}
        at = 0
        for entry in sorted(entries.values(), key=lambda e: (e.begin, e.end)):
            if entry.begin != at:
                raise ValueError(f"{entry.key} begins at byte {entry.begin} where {at} is expected")
            at = entry.end
        if at != data_bytes:
            raise ValueError(f"the tensors end at byte {at} and the file at {data_bytes}")
    except (ValueError, RecursionError) as error:
        raise FailedCheckpointError(f"{where} is damaged: {error or 'nested too deep'}") from None
    return entries, metadata


def _entry(key: str, value: Any) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{key} is not described by dtype, shape and data_offsets")
    if not isinstance(value["dtype"], str) or value["dtype"] not in DTYPES:
        raise ValueError(f"{key} has the unknown dtype {value['dtype']!r}")
    dtype, shape, offsets = DTYPES[value["dtype"]], value["shape"], value["data_offsets"]
    if not (_counts(shape) and _counts(offsets) and len(offsets) == 2 and len(shape) <= 16):
        raise ValueError(f"{key} has a shape or offsets that are no counts")
    begin, end = offsets
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"{key} of shape {shape} does not fill the bytes {begin} to {end}")
    return Entry(key, dtype, tuple(shape), begin, end)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found
