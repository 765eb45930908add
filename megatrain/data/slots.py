"""Where the virtual readers of the data stand. Ranks and workers take whole slots; a checkpoint keeps the table.

The table of all slots follows by arithmetic from one batch to the next, so every rank knows it without asking others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megatrain.base.errors import DataError
from megatrain.data import mixture

VERSION = 1


@dataclass
class Slots:
    """The place of every slot in every source, and what decides which source each draws from next."""

    tokens: NDArray[np.int64]
    """[slots, sources]: tokens that the slot has read of its part of the source, over all epochs."""
    credit: NDArray[np.int64]
    """[slots, sources]: see `mixture`."""
    rows: NDArray[np.int64]
    """[slots, sources]: rows read of the window of documents that begins at `tokens`; 0 where rows need no windows."""
    batches: int = 0
    """Global batches read so far."""
    drawn: int = 0
    """Tokens of those batches, padding included: what a curriculum goes by."""

    @property
    def n(self) -> int:
        return len(self.tokens)

    @classmethod
    def first(cls, n_slots: int, share: NDArray[np.int64], seed: int, seq_len: int) -> Self:
        credit = mixture.first_credit(share, seed, n_slots, seq_len)
        return cls(np.zeros_like(credit), credit, np.zeros_like(credit))

    def cursors(self, seed: int, sources: list[dict[str, str]], own: range | None = None) -> dict[str, Any]:
        """The table as JSON values; `sources` says which data sets its columns are.

        Args:
            own: the slots whose places are known here, where not all are: see `merged`.
        """
        return {
            "version": VERSION,
            "seed": seed,
            "slots": self.n,
            "batches": self.batches,
            "drawn": self.drawn,
            "sources": sources,
            "tokens": self.tokens.tolist(),
            "credit": self.credit.tolist(),
            **({"rows": self.rows.tolist()} if self.rows.any() or own is not None else {}),
            **({} if own is None else {"own": [own.start, own.stop]}),
        }

    def restore(self, cursors: dict[str, Any], seed: int, fingerprints: Sequence[str], paths: Sequence[str]) -> None:
        """Take the places that `cursors` holds, source by source.

        A source that is new begins at its beginning; weights and paths may have changed; one that is gone is left out.

        Raises:
            DataError: the table belongs to another order, or a source is not the one that was trained on.
        """
        if "own" in cursors:
            raise ValueError(f"cursors of slots {cursors['own']} alone: put them together with those of the others")
        if cursors.get("version") != VERSION:
            raise DataError(f"data cursors have version {cursors.get('version')!r} and this program reads {VERSION}")
        if cursors["slots"] != self.n:
            raise DataError(
                f"data.slots is {self.n} and the run was trained with {cursors['slots']}: slots are part of the order "
                f"of the data, so set data.slots: {cursors['slots']} (or start anew)"
            )
        if cursors["seed"] != seed:
            raise DataError(
                f"seed is {seed} and the run was trained with {cursors['seed']}: the seed is part of the order of the "
                f"data, so set seed: {cursors['seed']} (or start anew)"
            )
        saved = {source["fingerprint"]: i for i, source in enumerate(cursors["sources"])}
        saved_paths = {source["path"]: source["fingerprint"] for source in cursors["sources"]}
        tokens = np.array(cursors["tokens"], dtype=np.int64)
        rows = np.array(cursors.get("rows", np.zeros_like(tokens)), dtype=np.int64)
        for source, (fingerprint, path) in enumerate(zip(fingerprints, paths, strict=True)):
            if fingerprint in saved:
                self.tokens[:, source] = tokens[:, saved[fingerprint]]
                self.rows[:, source] = rows[:, saved[fingerprint]]
            elif path in saved_paths:
                raise DataError(
                    f"the data set at {path} has changed: its shards have digest {fingerprint[:12]} and the run was "
                    f"trained on {saved_paths[path][:12]}; bring that one back, or give the new one another path"
                )
        if [source["fingerprint"] for source in cursors["sources"]] == list(fingerprints):
            self.credit[:] = np.array(cursors["credit"], dtype=np.int64)
        self.batches, self.drawn = cursors["batches"], cursors["drawn"]


def merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The cursors after one batch from those of its readers, each of which knows the places of its own slots.

    Raises:
        ValueError: they are of different batches, or leave out a slot between them.
    """
    parts = sorted(parts, key=lambda part: part["own"][0])
    whole = dict(parts[0])
    for part in parts[1:]:
        (start, stop), (first, upto) = part["own"], whole["own"]
        if part["batches"] != whole["batches"] or start != upto:
            raise ValueError(f"cursors of slots {first} to {upto} and {start} to {stop} do not go together")
        for name in ("tokens", "rows"):
            whole[name] = whole[name][:start] + part[name][start:]
        whole["own"] = [first, stop]
    if whole["own"] == [0, whole["slots"]]:
        del whole["own"]
    return whole
