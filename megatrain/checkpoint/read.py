"""A committed checkpoint: found, checked against its digests, and read slice by slice into any layout."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.base.errors import CheckpointError, ConfigError, FailedCheckpointError, did_you_mean
from megatrain.checkpoint.manifest import (
    COMMIT,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    Manifest,
    StoredSlice,
    StoredTensor,
    decode,
    digest_of,
)
from megatrain.checkpoint.remote import open_storage
from megatrain.checkpoint.storage import Storage
from megatrain.checkpoint.tensorfile import DTYPE_NAMES
from megatrain.config.source import read as read_config
from megatrain.parallel.shard import Box, Slice

BLOCK_BYTES = 64 * 2**20
"""Read at once from a storage that cannot be mapped."""

_FOLDER = re.compile(r"step-(\d{8,})|\.step-(\d{8,})\.replaced")


def folder_of(step: int) -> str:
    return f"step-{step:08d}"


def candidates(storage: Storage) -> list[tuple[int, str]]:
    """(step, folder) of everything that has a COMMIT, newest first. Without one it was never whole."""
    found: dict[int, str] = {}
    for folder in sorted(storage.folders()):  # "." comes first: a replaced one counts only where its step has no other
        if (match := _FOLDER.fullmatch(folder)) and storage.size(f"{folder}/{COMMIT}") is not None:
            found[int(match[1] or match[2])] = folder
    return sorted(found.items(), reverse=True)


def unmarked(storage: Storage) -> list[str]:
    """Folders with the name of a checkpoint and no COMMIT."""
    named = [folder for folder in storage.folders() if re.fullmatch(r"step-\d{8,}", folder)]
    return sorted(folder for folder in named if storage.size(f"{folder}/{COMMIT}") is None)


class Commit:
    """A checkpoint whose manifest agrees with its COMMIT and whose files are there with the right sizes."""

    def __init__(self, storage: Storage, folder: str, manifest: Manifest):
        self.storage, self.folder, self.manifest = storage, folder, manifest

    @classmethod
    def open(cls, storage: Storage, folder: str) -> "Commit":
        """
        Raises:
            FailedCheckpointError: the manifest is not the committed one, or a file is missing or has another size.
        """
        try:
            manifest = _committed_manifest(storage, folder)
            for file in manifest.files.values():
                path = f"{folder}/{file.name}"
                size = storage.size(path)
                if size is None:
                    raise FailedCheckpointError(f"{storage.describe(path)} is missing: {_REMEDY}")
                if size != file.bytes:
                    raise FailedCheckpointError(
                        f"{storage.describe(path)} has {size} bytes and was written with {file.bytes}: {_REMEDY}"
                    )
            if (match := _FOLDER.fullmatch(folder)) and int(match[1] or match[2]) != manifest.step:
                raise FailedCheckpointError(
                    f"{storage.describe(folder)} is the checkpoint of step {manifest.step} under another's name: call "
                    f"it {folder_of(manifest.step)}, or give it a name of no step"
                )
        except OSError as error:
            raise _unreadable(storage.describe(folder), error) from None
        return cls(storage, folder, manifest)

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def digest(self) -> str:
        """The manifest's digest: two commits with the same one hold the same bits."""
        return self.manifest.digest

    def damage(self, rank: int = 0, size: int = 1, states: Callable[[str], bool] = lambda state: True) -> list[str]:
        """What is wrong with the bytes on disk, a sentence for each; `rank` of `size` checks its share.

        The shares of all ranks together are every byte of every file, or of the headers and the wanted `states`.
        """
        parts = list(self._parts(states))
        total = sum(end - begin for _, begin, end, _, _ in parts)
        problems, at = [], 0
        for file, begin, end, expected, what in parts:
            mine = at * size // max(total, 1) == rank
            at += end - begin
            if not mine:
                continue
            try:
                found = self._digest(f"{self.folder}/{file}", begin, end)
            except OSError as error:
                found = f"none ({error})"
            if found != expected:
                where = self.storage.describe(f"{self.folder}/{file}")
                digests = f"has digest {found[:16]} and was written with {expected[:16]}"
                problems.append(f"{where} is damaged: {what} {digests}; {_REMEDY}")
        return problems

    def reader(self, cast: bool = False) -> "Reader":
        """Its values. The digests must have been checked before: `damage`, or `Checkpoints.newest`, which does.

        Args:
            cast: fill slices of another dtype than was saved; otherwise that is refused.
        """
        return Reader(self, cast)

    def _parts(self, states: Callable[[str], bool]) -> Iterator[tuple[str, int, int, str, str]]:
        """(file, begin, end, digest, what it is) of everything that has a digest, in the order of the files."""
        found = [(f.name, 0, f.header_bytes, f.header_digest, "its header") for f in self.manifest.files.values()]
        for (state, name), tensor in self.manifest.tensors.items():
            for s in tensor.slices if states(state) else ():
                end = s.begin + s.box.numel * tensor.dtype.itemsize
                found.append((s.file, s.begin, end, s.digest, f"{state}/{name}"))
        yield from sorted(found)

    def _digest(self, path: str, begin: int, end: int) -> str:
        digest = hashlib.sha256()
        for at in range(begin, end, BLOCK_BYTES):
            digest.update(self.storage.read(path, at, min(at + BLOCK_BYTES, end)))
        return digest.hexdigest()


def _unreadable(place: str, error: OSError) -> FailedCheckpointError:
    remedy = "check the address, the network and the credentials" if "://" in place else "make it readable"
    return FailedCheckpointError(f"{place} cannot be read ({error}): {remedy}")


_REMEDY = "restore it, or take the commit before (checkpoint.fallback=true in training; else name its folder)"


def _committed_manifest(storage: Storage, folder: str) -> Manifest:
    path, marker = f"{folder}/{MANIFEST}", f"{folder}/{COMMIT}"
    if storage.size(marker) is None:
        raise FailedCheckpointError(
            f"{storage.describe(folder)} has no {COMMIT}: it was never written to its end, or is no checkpoint "
            "(`megatrain data verify` checks a data set)"
        )
    committed = bytes(storage.read(marker, 0, 128))
    if not re.fullmatch(rb"[0-9a-f]{64}\n", committed):
        raise FailedCheckpointError(f"{storage.describe(marker)} is damaged: it holds no digest; {_REMEDY}")
    expected = committed.decode().strip()
    size = storage.size(path)
    if size is None:
        raise FailedCheckpointError(f"{storage.describe(path)} is missing: {_REMEDY}")
    if size > MAX_MANIFEST_BYTES:
        raise FailedCheckpointError(f"{storage.describe(path)} has {size} bytes: at most {MAX_MANIFEST_BYTES} are read")
    text = bytes(storage.read(path, 0, size))
    if (found := digest_of(text)) != expected:
        where = f"{storage.describe(path)} has digest {found} and {COMMIT} says {expected}"
        raise FailedCheckpointError(f"{where}: one of them is damaged; {_REMEDY}")
    return decode(text, storage.describe(path))


class Reader:
    """The values of a commit. Nothing is read but what is asked for."""

    def __init__(self, commit: Commit, cast: bool = False):
        self.commit, self.manifest, self._cast = commit, commit.manifest, cast
        self.used: set[tuple[str, str]] = set()
        """(state, name) of every tensor that `fill` was asked for."""

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def state(self) -> Any:
        """What was given to `save` as state."""
        return self.manifest.state

    @property
    def facts(self) -> dict[str, Any]:
        """What wrote it: config, tokenizer, lineage, revision, versions."""
        return self.manifest.facts

    def states(self) -> list[str]:
        """The kinds of tensor held: weights, exp_avg, ..."""
        return sorted({state for state, _ in self.manifest.tensors})

    def names(self, state: str = "weights") -> list[str]:
        return sorted(name for of, name in self.manifest.tensors if of == state)

    def shapes(self, state: str = "weights") -> dict[str, tuple[int, ...]]:
        return {name: t.shape for (of, name), t in sorted(self.manifest.tensors.items()) if of == state}

    def stored(self, name: str, state: str = "weights") -> StoredTensor:
        """
        Raises:
            CheckpointError: there is no such tensor.
        """
        found = self.manifest.tensors.get((state, name))
        if found is None:
            where = self.commit.storage.describe(self.commit.folder)
            if not (known := self.names(state)):
                raise CheckpointError(f"{where} holds no {state}: it holds {', '.join(self.states()) or 'nothing'}")
            hint = did_you_mean(name, known) if len(known) < 20 else f"it holds {len(known)} others"
            raise CheckpointError(f"{where} holds no {state} of {name}: {hint}")
        return found

    @torch.no_grad()
    def fill(self, slice: Slice) -> None:
        """Write the saved values of this rectangle into `slice.values`.

        Raises:
            CheckpointError: the tensor is not there, or has another shape or dtype.
        """
        label = f"{slice.state} of {slice.name}"
        if not only_weights(slice.state) and (slice.state, slice.name) not in self.manifest.tensors:
            raise CheckpointError(
                f"{self.commit.storage.describe(self.commit.folder)} holds no {label}, which this run's optimizer "
                f"keeps (it holds {', '.join(self.states())}): set the optimizer that it was saved with, or begin a "
                "new run with its weights by checkpoint.init_from"
            )
        tensor = self.stored(slice.name, slice.state)
        if tensor.shape != tuple(slice.full_shape):
            raise CheckpointError(
                f"{label} has shape {list(tensor.shape)} in {self.commit.folder} "
                f"and {list(slice.full_shape)} in this model"
            )
        if tensor.dtype != slice.values.dtype and not self._cast:
            raise CheckpointError(
                f"{label}: saved as {DTYPE_NAMES[tensor.dtype]}, and this run keeps "
                f"{DTYPE_NAMES.get(slice.values.dtype, slice.values.dtype)}: keep the precision, or add "
                "precision.parameters to checkpoint.acknowledge"
            )
        self.used.add((slice.state, slice.name))
        if slice.matrix == tensor.matrix:
            self._read(tensor, slice.box, slice.values)
            return
        for box, values in _in_matrix(slice, tensor.matrix[1]):
            self._read(tensor, box, values)

    @torch.no_grad()
    def read_full(self, name: str, state: str = "weights") -> Tensor:
        """The undivided tensor, in host memory."""
        tensor = self.stored(name, state)
        rows, columns = tensor.matrix
        full = torch.empty(tensor.shape, dtype=tensor.dtype)
        self._read(tensor, Box(0, rows, 0, columns), full.view(rows, columns))
        return full

    def _read(self, tensor: StoredTensor, box: Box, out: Tensor) -> None:
        """Fill `out` [box.n_rows, box.n_columns] from every stored slice that meets the box."""
        for stored in tensor.slices:
            top, bottom = max(stored.box.row, box.row), min(stored.box.row + stored.box.n_rows, box.row + box.n_rows)
            left = max(stored.box.column, box.column)
            right = min(stored.box.column + stored.box.n_columns, box.column + box.n_columns)
            if top < bottom and left < right:
                self._copy(
                    tensor.dtype,
                    stored,
                    Box(top, bottom - top, left, right - left),
                    out[top - box.row : bottom - box.row, left - box.column : right - box.column],
                )

    def _copy(self, dtype: torch.dtype, stored: StoredSlice, wanted: Box, out: Tensor) -> None:
        """Copy a rectangle that lies inside one stored slice, in blocks of rows (of columns where a row is long)."""
        path, width, item = f"{self.commit.folder}/{stored.file}", stored.box.n_columns, dtype.itemsize
        rows_each = max(1, BLOCK_BYTES // (width * item))
        columns_each = wanted.n_columns if rows_each > 1 else max(1, BLOCK_BYTES // item)
        for row in range(0, wanted.n_rows, rows_each):
            for column in range(0, wanted.n_columns, columns_each):
                n_rows = min(rows_each, wanted.n_rows - row)
                n_columns = min(columns_each, wanted.n_columns - column)
                first = (wanted.row + row - stored.box.row) * width + wanted.column + column - stored.box.column
                begin = stored.begin + first * item
                end = begin + ((n_rows - 1) * width + n_columns) * item
                data = self.commit.storage.read(path, begin, end)
                if len(data) != end - begin:
                    raise FailedCheckpointError(f"{self.commit.storage.describe(path)} was cut off while it was read")
                flat = torch.frombuffer(bytearray(data) if isinstance(data, bytes) else data, dtype=dtype)
                block = flat.as_strided((n_rows, n_columns), (width, 1))
                out[row : row + n_rows, column : column + n_columns].copy_(block)


def _in_matrix(slice: Slice, width: int) -> Iterator[tuple[Box, Tensor]]:
    """A slice as rectangles of the same tensor seen as a matrix of `width` columns, each with its values."""
    box, columns = slice.box, slice.matrix[1]
    runs = [(box.row * columns, slice.values.view(1, -1))] if box.n_columns == columns else [
        ((box.row + i) * columns + box.column, slice.values[i : i + 1]) for i in range(box.n_rows)
    ]  # fmt: skip
    for flat, values in runs:
        at = 0
        while at < values.numel():
            row, column = divmod(flat + at, width)
            left = values.numel() - at
            n_rows, n_columns = (
                (left // width, width) if column == 0 and left >= width else (1, min(width - column, left))
            )
            numel = n_rows * n_columns
            yield Box(row, n_rows, column, n_columns), values[:, at : at + numel].view(n_rows, n_columns)
            at += numel


def only_weights(state: str) -> bool:
    """What is wanted of a checkpoint that is used and not resumed."""
    return state == "weights"


def find(place: str | Path, check: bool = True, states: Callable[[str], bool] = lambda state: True) -> Commit:
    """The checkpoint that a path or URL means: a step's folder, or a run's (then its newest).

    Args:
        check: the wanted `states` against their digests, byte by byte; needed before values are used.

    Raises:
        CheckpointError: there is none.
        FailedCheckpointError: it is damaged.
    """
    text = str(place).rstrip("/")
    none = f"{place} holds no checkpoint: name a run's folder or one of its step-... folders"
    if "://" not in text and not os.path.isdir(text or "/"):
        raise CheckpointError(none)
    try:
        commit = _found(text)
        problems = commit.damage(states=states) if commit and check else []
    except OSError as error:
        raise _unreadable(str(place), error) from None
    if commit is None:
        told = [f" (its checkpoint.dir says {there})" for there in _told_by_its_run(text)]
        raise CheckpointError("".join([none, *told]))
    if problems:
        raise FailedCheckpointError(problems[0])
    return commit


def _found(text: str) -> Commit | None:
    """The checkpoint in a folder that is one, is a run's, or holds a run's checkpoints."""
    inside = open_storage(text)
    if any(inside.size(name) is not None for name in (COMMIT, MANIFEST)):
        parent, _, name = text.rpartition("/")
        return Commit.open(open_storage(parent or ("/" if text.startswith("/") else ".")), name)
    within = [open_storage(place) for place in (*_told_by_its_run(text), f"{text}/checkpoints")]
    storage = next((s for s in (*within, inside) if candidates(s)), None)
    return None if storage is None else Commit.open(storage, candidates(storage)[0][1])


def _told_by_its_run(folder: str) -> list[str]:
    """Where the run that lives in `folder` keeps its checkpoints, if that is elsewhere (`checkpoint.dir`)."""
    config = Path(folder) / "config.yaml"
    if "://" in folder or not config.is_file():
        return []
    try:
        said = read_config(config).plain()
        place = said["checkpoint"]["dir"]
        return [f"{place.rstrip('/')}/{said['name']}"] if place else []
    except (ConfigError, KeyError, TypeError, AttributeError):
        return []  # not a run's
