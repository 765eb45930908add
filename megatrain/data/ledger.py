"""The ledger of a run: which batches of which order were trained on at which steps, and nothing afterwards removed.

The order of the data is a pure function, so a line for a range of steps says as much as the list of its documents: an
`order` line holds what decides the batches, `trained` lines hold ranges of steps with a digest of where the order then
stands, and a run that goes on from an earlier checkpoint adds `rewound`. Lines are only ever appended, and each holds
the hash of all lines before it, so a line that is changed or taken out later shows.

    {"kind": "order", "step": 0, "data": {...}, "seed": 0, "global_batch": 16, "cursors": null, "chain": "..."}
    {"kind": "trained", "after": 0, "upto": 100, "batches": [0, 100], "digest": "...", "skipped": [], "chain": "..."}
    {"kind": "rewound", "step": 50, "chain": "..."}
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from megatrain.base.errors import DataError
from megatrain.data.store import redacted

VERSION = 1
FILE = "ledger.jsonl"
"""Its name in a run's folder."""
_ORDER_KEYS = ("data", "seed", "global_batch", "sources")


@dataclass(frozen=True)
class Trained:
    """Steps after+1 .. upto were trained, on consecutive batches of an order."""

    order: dict[str, Any]
    """The `order` line."""
    after: int
    upto: int
    first_batch: int
    """Batch of the order, counted from 0, that step after+1 took."""
    digest: str
    """Of the cursors after the last of these batches; empty where later steps of the range were rewound."""
    skipped: tuple[int, ...]
    """Steps whose gradient was not finite: their batch changed nothing."""


@dataclass(frozen=True)
class Head:
    """A ledger as it was at some moment: kept elsewhere, it shows that no line was changed or taken out since."""

    lines: int
    chain: str
    """The hash of all of them."""

    @classmethod
    def of(cls, value: dict[str, Any] | None) -> Self | None:
        """From its JSON value; None where there is none."""
        return None if value is None else cls(value["lines"], value["chain"])


class Ledger:
    """Reads and appends to the ledger at `path`; in a run rank 0 alone does."""

    def __init__(self, path: Path):
        """Opens the ledger, which may not be there yet.

        Raises:
            DataError: a line was changed or taken out.
        """
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self._chains = [""]
        """The hash of the first n lines, for every n."""
        self._size = 0
        if path.exists():
            for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):  # what has no newline was cut
                self.lines.append(self._checked(line, number))
                self._size += len(line) + 1

    def _checked(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            value = json.loads(line)
            chain = value.pop("chain")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DataError(f"line {number} of {self.path} is no line of a ledger: restore the file") from error
        if chain != _link(self._chains[-1], value):
            raise DataError(
                f"{self.path} was changed: line {number} does not follow from the lines before it; restore the file, "
                "or move it away to start a new ledger with the next run"
            )
        self._chains.append(chain)
        return value

    def refuse_other(self, known: Head) -> None:
        """Raise unless this is the ledger that `known` was taken of, with lines added at most.

        Raises:
            DataError: lines are missing, or are others.
        """
        if known.lines > len(self.lines) or self._chains[known.lines] != known.chain:
            raise DataError(
                f"{self.path} is not the ledger that the checkpoint knows (it had {known.lines} lines and this one has "
                f"{len(self.lines)}, or others): restore the file, or move it away to start a new ledger"
            )

    def start(self, step: int, cursors: dict[str, Any] | None, order: dict[str, Any]) -> None:
        """A run begins, or goes on after `step`, in the order that `order_of` describes.

        Args:
            cursors: where the order stands after `step`: None at its very beginning.
        """
        last = self.last_step
        if last is not None and last > step:
            self._append({"kind": "rewound", "step": step})
        elif last is not None and last < step:  # the run ended between a save and its line here
            self.trained(step, cursors)
        now = {key: order[key] for key in _ORDER_KEYS}
        before = self._order
        if before is None or {key: before[key] for key in _ORDER_KEYS} != now:
            self._append({"kind": "order", "version": VERSION, "step": step, **now, "cursors": cursors})

    def trained(self, step: int, cursors: dict[str, Any] | None, skipped: Iterable[int] = ()) -> None:
        """The steps after those that are known, up to `step`, have been taken; `cursors` came with the last batch."""
        last = self.last_step
        if last is None:
            raise ValueError("a ledger starts with `start`")
        if step == last or cursors is None:
            return
        stop = cursors["batches"]
        self._append(
            {
                "kind": "trained",
                "after": last,
                "upto": step,
                "batches": [stop - (step - last), stop],
                "digest": digest(cursors),
                "skipped": sorted(set(skipped)),
            }
        )

    @property
    def last_step(self) -> int | None:
        """The step that the run stands at; None in an empty ledger."""
        for line in reversed(self.lines):
            return line["upto"] if line["kind"] == "trained" else line["step"]
        return None

    @property
    def head(self) -> Head:
        """The ledger as it is now."""
        return Head(len(self.lines), self._chains[-1])

    @property
    def _order(self) -> dict[str, Any] | None:
        return next((line for line in reversed(self.lines) if line["kind"] == "order"), None)

    def _append(self, value: dict[str, Any]) -> None:
        chain = _link(self._chains[-1], value)
        line = json.dumps(value | {"chain": chain}, ensure_ascii=False).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.truncate(self._size)  # what an earlier process had begun to write and did not finish
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(value)
        self._chains.append(chain)
        self._size += len(line)

    def history(self) -> Iterator[Trained]:
        """What the weights at the last step were trained on, in order: ranges that were rewound are cut or left out."""
        ranges: list[Trained] = []
        order: dict[str, Any] = {}
        for line in self.lines:
            if line["kind"] == "order":
                order = line
            elif line["kind"] == "rewound":
                ranges = [_cut(r, line["step"]) for r in ranges if r.after < line["step"]]
            else:
                skipped = tuple(line["skipped"])
                first = line["batches"][0]
                ranges.append(Trained(order, line["after"], line["upto"], first, line["digest"], skipped))
        yield from ranges


def order_of(data: dict[str, Any], seed: int, global_batch: int, fingerprints: list[str]) -> dict[str, Any]:
    """What decides the batches: the `data` part of the run file as plain values, without what does not matter."""
    deciding = {key: value for key, value in data.items() if key not in ("workers", "cache", "allow_pipe")}
    deciding["sources"] = [source | {"path": redacted(source["path"])} for source in data["sources"]]
    return {"data": deciding, "seed": seed, "global_batch": global_batch, "sources": fingerprints}


def digest(cursors: dict[str, Any]) -> str:
    """A hash of where an order stands: equal exactly when every slot stands at the same place of the same data."""
    where = {key: value for key, value in cursors.items() if key != "sources"}
    where["sources"] = [source["fingerprint"] for source in cursors["sources"]]  # their paths may change
    return hashlib.sha256(json.dumps(where, sort_keys=True).encode()).hexdigest()


def _link(chain: str, value: dict[str, Any]) -> str:
    return hashlib.sha256((chain + json.dumps(value, sort_keys=True)).encode()).hexdigest()


def _cut(trained: Trained, step: int) -> Trained:
    if trained.upto <= step:
        return trained
    return replace(trained, upto=step, digest="")
