"""Tensors out of a pickled torch file, with nothing in it executed.

`torch.save` writes a zip archive: a pickle that describes objects, and the raw bytes of each storage. The pickle is
read by an unpickler that knows the few names tensors are made of. Objects of packages that are expected in such files
(settings, enumerations) become inert placeholders; any other name is refused before anything is called.
"""

import contextlib
import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.base.errors import CheckpointError, FailedCheckpointError
from megatrain.checkpoint.storage import LocalStorage

MAX_PICKLE_BYTES = 64 * 2**20

STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip

EXPECTED_PACKAGES = (
    "deepspeed", "argparse", "numpy", "megatron", "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem", "torch.serialization", "transformer_engine",
)  # fmt: skip
"""What trainers leave beside their tensors, as packages or modules; never imported, never called."""


class Placeholder:
    """What stands for an object of a class that is not wanted: it keeps what it was made of, and does nothing."""

    args: tuple[Any, ...] = ()
    state: Any = None
    """What the object was filled with; for most, its attributes by name."""

    def __new__(cls, *args: Any, **options: Any) -> "Placeholder":
        made = object.__new__(cls)
        made.args = args
        return made

    def __init__(self, *args: Any, **options: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *args: Any, **options: Any) -> "Placeholder":
        return self

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def attributes(held: Any) -> dict[str, Any]:
    """Of an object that a placeholder stands for; empty where it has none."""
    return held.state if isinstance(held, Placeholder) and isinstance(held.state, dict) else {}


@dataclass(frozen=True)
class Stored:
    """A storage of the archive: bytes [begin, end) of the file."""

    begin: int
    end: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Region:
    """Some bytes [begin, end) of a file, mapped when they are first read.

    Mapped without a descriptor that stays open: the files of a thousand ranks are held at once.
    """

    path: Path
    begin: int
    end: int

    @cached_property
    def mapped(self) -> Tensor:
        file: Any = torch.UntypedStorage.from_file(str(self.path), shared=False, nbytes=self.path.stat().st_size)
        return torch.empty(0, dtype=torch.uint8).set_(file)[self.begin : self.end]

    def read(self, begin: int, end: int) -> Tensor:
        """uint8 [end - begin]."""
        return self.mapped[begin:end]

    def __str__(self) -> str:
        return str(self.path)


def load_pickled(path: str | Path, begin: int = 0, end: int | None = None) -> Any:
    """The objects of what torch.save wrote: a file, or the bytes [begin, end) of one.

    Tensors are mapped: their bytes are read when they are used.

    Raises:
        CheckpointError: it is no such file, or it asks for anything else to be called.
        FailedCheckpointError: it is damaged.
    """
    path = Path(path)
    with _told(path):
        region = Region(path, begin, path.stat().st_size if end is None else end)
        archived = path if begin == 0 and end is None else io.BytesIO(region.mapped.numpy().tobytes())
        with zipfile.ZipFile(archived) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            described = [name for name in entries if name.endswith("/data.pkl")]
            if len(described) != 1:
                raise CheckpointError(f"{path} is not a file of torch.save: it describes no objects")
            if entries[described[0]].file_size > MAX_PICKLE_BYTES:
                raise CheckpointError(
                    f"{path} describes objects in {entries[described[0]].file_size} bytes: that is too many"
                )
            text = archive.read(described[0])
        prefix = described[0].removesuffix("data.pkl")
        return _Unpickler(text, region, prefix, entries).load()


def load_description(path: str | Path) -> Any:
    """The objects of a file that pickle wrote, in which there are no tensors: the index of a torch_dist checkpoint.

    Raises:
        CheckpointError, FailedCheckpointError: as `load_pickled`.
    """
    path = Path(path)
    with _told(path):
        size = path.stat().st_size
        if size > MAX_PICKLE_BYTES:
            raise CheckpointError(f"{path} has {size} bytes: that is too many for a description")
        return _Unpickler(path.read_bytes(), Region(path, 0, size), "", {}).load()


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """What can go wrong with a pickle, in words."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise FailedCheckpointError(f"{path} cannot be read: {error}") from None
    except Exception as error:  # a damaged pickle fails in any way
        raise FailedCheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def write_pickled(path: Path, value: Any) -> None:
    """A new file as `torch.save` writes it, and on the disk when this returns.

    Written from memory: an error of the file system inside `torch.save` itself comes out as one of its archive.

    Raises:
        OSError: as writing any file.
    """
    archive = io.BytesIO()
    torch.save(value, archive)
    LocalStorage(path.parent).write(path.name, [archive.getbuffer()])


class _Unpickler(pickle.Unpickler):
    def __init__(self, text: bytes, region: Region, prefix: str, entries: dict[str, zipfile.ZipInfo]):
        super().__init__(io.BytesIO(text))
        self.region, self.prefix, self.entries = region, prefix, entries
        self.known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): torch.Size,
            ("torch._utils", "_rebuild_tensor_v2"): self.tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *rest: data,
            ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *rest: data,
            # A tensor with attributes: rebuilt by one of the functions above, the attributes left out.
            ("torch._tensor", "_rebuild_from_type_v2"): lambda rebuild, kind, arguments, state: rebuild(*arguments),
            ("torch", "Tensor"): Placeholder,
            ("torch.nn.parameter", "Parameter"): Placeholder,
            **dict.fromkeys([("pathlib", name) for name in ("PosixPath", "Path", "PurePosixPath")], Placeholder),
            ("builtins", "set"): set,
            ("__builtin__", "set"): set,
        }

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) in self.known:
            return self.known[module, name]
        if module == "torch" and name in STORAGES:
            return STORAGES[name]  # type: ignore[return-value]  # only ever a part of a persistent id
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in EXPECTED_PACKAGES or module.split(".")[0] in EXPECTED_PACKAGES:
            return Placeholder
        raise CheckpointError(
            f"{self.region} asks for {module}.{name}, which tensors do not need and which is not called: the file may "
            "be malicious; have it saved as safetensors by those who made it"
        )

    def persistent_load(self, pid: Any) -> Stored:
        kind, dtype, key, _, numel = pid
        entry = self.entries[f"{self.prefix}data/{key}"]
        dtype = dtype if isinstance(dtype, torch.dtype) else torch.uint8
        if kind != "storage" or entry.compress_type != zipfile.ZIP_STORED or numel * dtype.itemsize != entry.file_size:
            raise FailedCheckpointError(f"{self.region} is damaged: its storage {key} is not as it is described")
        # The local header repeats the name and has an extra field of its own length before the bytes.
        local = self.region.read(entry.header_offset, entry.header_offset + 30).numpy().tobytes()
        begin = (
            entry.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        )
        return Stored(begin, begin + entry.file_size, dtype)

    def tensor(self, stored: Stored, offset: int, shape: Any, stride: Any, *rest: Any) -> Tensor:
        if stored.begin == stored.end:
            return torch.empty(tuple(shape), dtype=stored.dtype)
        data = self.region.read(stored.begin, stored.end)
        misplaced = data.storage_offset() % stored.dtype.itemsize
        flat = (data.clone() if misplaced else data).view(stored.dtype)
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if offset < 0 or any(step < 0 for step in stride) or (math.prod(shape) and last >= flat.numel()):
            raise FailedCheckpointError(f"{self.region} is damaged: a tensor lies beyond its storage")
        return flat.as_strided(tuple(shape), tuple(stride), flat.storage_offset() + offset)
