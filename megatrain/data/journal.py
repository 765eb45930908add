"""What a build has on disk so far: a folder beside the data set, with a line for each shard that is whole.

    .NAME.building/journal.jsonl    first the build it belongs to, then a line a shard
    .NAME.building/...              the data set as far as it is; renamed to NAME at the end

One process at a time works in the folder; a lock says so and ends with the process, however it ends.
"""

import dataclasses
import fcntl
import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from megatrain.base.errors import DataError, UserError
from megatrain.base.files import fsync_folder, read_json_lines, written_whole
from megatrain.data.documents import Refused
from megatrain.data.manifest import ShardEntry

_LINES = "journal.jsonl"
_EXAMPLES = 5


@dataclass
class Tally:
    """How often documents were refused for which reason, and the first few of each."""

    refused: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, refused: Refused) -> None:
        self.refused[refused.reason] += 1
        known = self.examples.setdefault(refused.reason, [])
        if len(known) < _EXAMPLES:
            known.append(refused.id)

    def as_json(self) -> dict[str, Any]:
        return {reason: {"documents": n, "first": self.examples[reason]} for reason, n in self.refused.items()}

    def said(self) -> str:
        """Why nothing is left, and what to do."""
        if not self.refused:
            return "the files are empty; give some with UTF-8 text"
        found = ", ".join(f"{n:,} {reason}" for reason, n in self.refused.most_common())
        if any(reason.startswith("no text under") for reason in self.refused):
            return f"{found}; name the key that holds the text with --text-field"
        return f"{found}; give files with UTF-8 text"

    @classmethod
    def of(cls, value: dict[str, Any]) -> Self:
        counts = Counter({reason: found["documents"] for reason, found in value.items()})
        return cls(counts, {reason: list(found["first"]) for reason, found in value.items()})


@dataclass(frozen=True)
class Done:
    """A shard that is whole."""

    split: str
    shard: ShardEntry
    next_chunk: int
    """The split is complete up to this chunk of the input."""
    tally: dict[str, Any]
    """What had been refused up to there."""


class Journal:
    """The folder of a build under way. Use as a context: it holds the lock."""

    def __init__(self, out: Path, folder: Path, lock: IO[str], done: list[Done]):
        self.out, self.folder, self.done = out, folder, done
        self._lock = lock

    @classmethod
    def open(cls, out: Path, build: str) -> Self:
        """The folder for the build called `build`: empty, or as an earlier process of the same build left it.

        Raises:
            DataError: another process is at work in it, or `out` holds something else.
        """
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise DataError(f"{out} is not empty and holds no data set: choose another --out, or empty it")
        folder = out.with_name(f".{out.name}.building")
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "a")  # noqa: SIM115
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise DataError(f"another process is building {out}: wait for it, or choose another --out") from error
        lines = read_json_lines(folder / _LINES)
        if not lines or lines[0] != {"build": build}:
            _empty(folder)
            with written_whole(folder / _LINES) as file:
                file.write(json.dumps({"build": build}) + "\n")
            lines = lines[:0]
        for unfinished in folder.rglob(".*.tmp"):
            unfinished.unlink()
        done = [
            Done(line["split"], ShardEntry(**line["shard"]), line["next_chunk"], line["tally"]) for line in lines[1:]
        ]
        return cls(out, folder, lock, done)

    def shards(self, split: str) -> tuple[ShardEntry, ...]:
        return tuple(done.shard for done in self.done if done.split == split)

    def next_chunk(self, split: str) -> int:
        """The first chunk of the input that the shards of `split` do not hold."""
        return max((done.next_chunk for done in self.done if done.split == split), default=0)

    def tally(self, next_chunk: int) -> Tally:
        """What had been refused before that chunk, which must be where a split stands."""
        return Tally.of(next((done.tally for done in self.done if done.next_chunk == next_chunk), {}))

    def add(self, done: Done) -> None:
        """Remember a shard whose files are on disk."""
        self.done.append(done)
        with open(self.folder / _LINES, "rb+") as file:
            file.seek(file.read().rfind(b"\n") + 1)  # a crash may have left part of a line
            file.truncate()
            file.write(json.dumps(dataclasses.asdict(done)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def publish(self) -> None:
        """Give the folder its name. Before this there is no data set; after it there is a whole one."""
        for name in (_LINES, "lock"):
            (self.folder / name).unlink()
        fsync_folder(self.folder)
        os.rename(self.folder, self.out)  # onto an empty folder too
        fsync_folder(self.out.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, UserError) and not self.done:
            shutil.rmtree(self.folder, ignore_errors=True)  # there is nothing to go on from
        self._lock.close()


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name == "lock":
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()
