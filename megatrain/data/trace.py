"""What a run is trained on, batch by batch, without training."""

import hashlib
from collections.abc import Iterator
from typing import Any

from megatrain.data.config import Data
from megatrain.data.feed import Feed
from megatrain.data.manifest import TRAIN, Manifest
from megatrain.data.rows import Rows, empty, pieces
from megatrain.data.stream import Order, Stream


def trace(
    data: Data, *, seed: int, global_batch: int, start: int, stop: int, dp: int = 1, split: str = TRAIN
) -> Iterator[dict[str, Any]]:
    """A line for each global batch start .. stop-1 (0 is the first), as the ranks of a run would read it.

    Args:
        dp: data-parallel ranks whose feeds are put together, each with `data.workers` workers.

    Returns:
        `step`; `sha256` of the tokens as little-endian int64 [global_batch, seq_len] in batch order; `documents`, the
        ids of the documents in the batch in order of appearance; `begun`, those that begin in it: each document of a
        source is in one `begun` per epoch.
    """
    order = Order(data, seed, global_batch, split=split)
    stream = Stream(order)
    for _ in range(start):
        stream.skip()
    cursors = stream.cursors()
    feeds = [
        Feed.open(data, seed=seed, global_batch=global_batch, dp_rank=r, dp_size=dp, cursors=cursors, split=split)
        for r in range(dp)
    ]
    try:
        for step in range(start, stop):
            _, rows = stream.fill(empty(*stream.shape))
            digest = hashlib.sha256()
            for feed in feeds:
                digest.update(next(feed).tokens.numpy().astype("<i8").tobytes())
            yield {"step": step, "sha256": digest.hexdigest(), **documents(rows)}
    finally:
        for feed in feeds:
            feed.close()


def documents_of(
    data: Data, *, seed: int, global_batch: int, cursors: Any, manifests: tuple[Manifest, ...] | None = None
) -> list[str]:
    """Ids of the documents in the global batch that begins where the slots stand at `cursors` (None: the first)."""
    stream = Stream(Order(data, seed, global_batch, manifests=manifests), cursors)
    _, rows = stream.fill(empty(*stream.shape))
    return documents(rows)["documents"]


def documents(rows: Rows) -> dict[str, list[str]]:
    """`documents` and `begun` of the rows, in order of appearance; a document that goes on in the next row is one."""
    found: list[str] = []
    begun: list[str] = []
    for piece in pieces(rows):
        if piece.begins:
            begun.append(piece.document)
        if piece.begins or not found or found[-1] != piece.document:
            found.append(piece.document)
    return {"documents": found, "begun": begun}
