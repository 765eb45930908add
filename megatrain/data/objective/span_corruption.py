"""Spans of a document replaced by sentinels, and told after it: the denoising of T5, for a decoder.

The row reads the document with a sentinel for each span, then each sentinel with the tokens of its span; only those
count in the loss. What the sentinels take is cut from the end of what stands in the row.

Papers: Raffel et al. 2020, arXiv:1910.10683, section 3.1.4 (spans); Tay et al. 2022, arXiv:2205.05131 (for decoders).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatrain.data.objective import OBJECTIVE, Name, Seeds, Special, fractions, ids_of
from megatrain.data.order import permutation
from megatrain.data.rows import Rows, pieces

_SHORTEST = 8


@OBJECTIVE.register("span_corruption")
@dataclass(frozen=True, kw_only=True)
class SpanCorruption:
    sentinels: tuple[Name, ...]
    """Special tokens that stand for the spans, in order; a document has at most so many."""
    rate: float = 1.0
    """Share of the documents that are rewritten."""
    density: float = 0.15
    """Share of the tokens in spans."""
    span: float = 3.0
    """Mean tokens of a span."""

    def problems(self) -> list[str]:
        found = []
        if not self.sentinels:
            found.append("data.objective.sentinels is empty: name the special tokens that stand for spans")
        if not 0 <= self.rate <= 1:
            found.append(f"data.objective.rate is {self.rate}: it must be between 0 and 1")
        if not 0 < self.density < 1:
            found.append(f"data.objective.density is {self.density}: it must be above 0 and below 1")
        if self.span < 1:
            found.append(f"data.objective.span is {self.span}: it must be at least 1")
        return found

    def build(self, special: Special) -> "SpanRewriter":
        return SpanRewriter(self, np.array(ids_of("data.objective.sentinels", self.sentinels, special)))


@dataclass(frozen=True)
class SpanRewriter:
    config: SpanCorruption
    sentinels: NDArray[np.int64]

    def rewrite(self, rows: Rows, seeds: Seeds) -> None:
        for piece in list(pieces(rows)):
            body = rows.body(piece)
            if len(body) < _SHORTEST:
                continue
            seed = seeds(piece.row, piece.column)
            if fractions(seed, 1)[0] < self.config.rate:
                rows.rewrite(piece, *self.corrupt(body, seed))

    def corrupt(self, body: NDArray[np.int64], seed: int) -> tuple[NDArray, NDArray]:
        """Targets that replace `body` [n], and their weights: both [n]."""
        n, per_token = len(body), self.config.density / self.config.span
        n_spans = min(max(1, round(n * per_token / (1 + 2 * per_token))), len(self.sentinels), n // 4)
        kept = body[: n - 2 * n_spans]  # each sentinel stands twice
        n_noise = min(max(n_spans, round(len(kept) * self.config.density)), len(kept) - n_spans)
        noise, clean = _parts(n_noise, n_spans, seed, "noise"), _parts(len(kept) - n_noise, n_spans, seed, "clean")
        ends = np.cumsum(np.stack([clean, noise], axis=1).reshape(-1))  # clean, noise, clean, noise, ...
        pieces = np.split(kept, ends[:-1])
        read: list[NDArray[np.int64]] = []
        told: list[NDArray[np.int64]] = []
        for sentinel, before, span in zip(self.sentinels, pieces[::2], pieces[1::2], strict=False):
            read += [before, np.array([sentinel])]
            told += [np.array([sentinel]), span]
        targets = np.concatenate(read + told)
        weights = np.ones(n, dtype=np.float32)
        weights[: n - n_noise - n_spans] = 0
        return targets, weights


def _parts(total: int, n: int, seed: int, name: str) -> NDArray[np.int64]:
    """`total` as a sum of `n` numbers of at least 1, all ways equally likely."""
    cuts = np.sort(permutation(total - 1, seed, name)[: n - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))
