"""Tensors of a checkpoint of torch.distributed.checkpoint (Megatron's torch_dist), read without executing anything.

`.metadata` describes each full tensor as chunks (offsets and sizes) and says in which file, and at which byte, each
chunk lies; there it is what torch.save writes. Only the chunks that meet what is asked for are read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.base.errors import CheckpointError, FailedCheckpointError
from megatrain.convert.pickled import attributes, load_description, load_pickled

METADATA = ".metadata"


@dataclass(frozen=True)
class Chunk:
    """A block of a full tensor, and the bytes [begin, end) of the file that hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    begin: int
    end: int


@dataclass(frozen=True)
class Described:
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class DistFolder:
    """Full tensors by name.

    Raises:
        CheckpointError: the description is missing, damaged, or asks for code to be called.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / METADATA).is_file():
            raise CheckpointError(f"{self.path} has no {METADATA}: give a folder of torch.distributed.checkpoint")
        found = load_description(self.path / METADATA)
        try:
            self.tensors = dict(self._described(attributes(found)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FailedCheckpointError(f"{self.path / METADATA} is not laid out as torch does it: {error!r}") from None

    def _described(self, metadata: dict[str, Any]) -> Iterator[tuple[str, Described]]:
        places = {}
        for index, info in metadata["storage_data"].items():
            at, place = attributes(index), attributes(info)
            if place.get("transform_descriptors"):
                raise CheckpointError(f"{self.path} holds compressed tensors: save it without transforms")
            places[at["fqn"], tuple(at.get("offset") or ())] = place
        for name, held in metadata["state_dict_metadata"].items():
            told = attributes(held)
            if "chunks" not in told:
                continue  # bytes: the state of a layer that is no tensor
            chunks = []
            for chunk in map(attributes, told["chunks"]):
                offsets = tuple(chunk["offsets"])
                place = places[name, offsets]
                file, begin = place["relative_path"], place["offset"]
                if not isinstance(file, str) or "/" in file or file.startswith(".."):
                    raise CheckpointError(f"{self.path / METADATA} names {file!r}, which is no file of this folder")
                chunks.append(Chunk(offsets, tuple(chunk["sizes"]), file, begin, begin + place["length"]))
            yield name, Described(tuple(told["size"]), tuple(chunks))

    def read(self, name: str, first: int | None = None) -> Tensor:
        """A full tensor, or the part with index `first` of its first dimension.

        Raises:
            FailedCheckpointError: chunks are missing or have other sizes than described.
        """
        held = self.tensors[name]
        low, high = (0, held.shape[0] if held.shape else 1) if first is None else (first, first + 1)
        shape = (high - low, *held.shape[1:]) if held.shape else ()
        full: Tensor | None = None
        filled = 0
        for chunk in held.chunks:
            top = max(low, chunk.offsets[0]) if held.shape else 0
            bottom = min(high, chunk.offsets[0] + chunk.sizes[0]) if held.shape else 1
            if top >= bottom:
                continue
            values = load_pickled(self.path / chunk.file, chunk.begin, chunk.end)
            if not isinstance(values, Tensor) or tuple(values.shape) != chunk.sizes:
                raise FailedCheckpointError(f"{self.path / chunk.file} does not hold {name} as described")
            if full is None:
                full = torch.empty(shape, dtype=values.dtype)
            if not held.shape:
                return values.clone()
            part = values[top - chunk.offsets[0] : bottom - chunk.offsets[0]]
            inner = tuple(slice(o, o + n) for o, n in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True))
            full[(slice(top - low, bottom - low), *inner)] = part
            filled += part.numel()
        if full is None or filled != full.numel():
            raise FailedCheckpointError(f"{self.path} holds {filled} elements of {name}: its chunks are not whole")
        return full if first is None else full[0]
