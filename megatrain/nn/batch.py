"""What a model is trained on: rows of tokens with everything an attention mask needs to be built from."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Columns = tuple[tuple[int, int], ...]
"""Ranges [start, stop) of the tokens of a row."""


@dataclass(frozen=True)
class Batch:
    """Rows of a batch; every tensor is [rows, seq].

    Masks are not data: each attention kind builds its own from `positions` and `documents`, which never fall in a row.
    """

    tokens: Tensor
    """int64: what the model reads."""
    targets: Tensor
    """int64: the token that follows each."""
    weights: Tensor
    """float32: what each target counts in the loss; 0 leaves it out."""
    positions: Tensor
    """int64: position of each token within its document."""
    documents: Tensor
    """int32: number of each token's document within its row; equal numbers may attend to each other."""
    most_documents: int | None = None
    """No row holds more documents; None: it is not known. A number of the host, so that no one has to ask a GPU."""
    step: int = 0
    """Number of the global batch these rows are from; with `first_row` it names each element, for dropout."""
    first_row: int = 0
    """Number of the first row within the global batch."""
    columns: Columns | None = None
    """What of each row this context-parallel rank computes, in this order; None for all."""
    cursors: Any = None
    """Where the feed stands after this batch, as plain JSON values; saved with the run."""

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    def split(self, rows: int) -> Iterator["Batch"]:
        """Micro-batches of `rows` rows (the last may have fewer)."""
        names = ("tokens", "targets", "weights", "positions", "documents")
        pieces = zip(*(getattr(self, name).split(rows) for name in names), strict=True)
        for i, parts in enumerate(pieces):
            first = self.first_row + i * rows
            yield dataclasses.replace(self, first_row=first, **dict(zip(names, parts, strict=True)))

    def context_part(self, columns: Columns) -> "Batch":
        """The same rows, of which this rank computes the tokens of `columns`: the targets of others count nothing here.

        Tokens, positions and documents stay whole, since attention masks are built from them.
        """
        if columns == ((0, self.tokens.shape[1]),):
            return self
        weights = torch.zeros_like(self.weights)
        for start, stop in columns:
            weights[:, start:stop] = self.weights[:, start:stop]
        return dataclasses.replace(self, weights=weights, columns=columns)

    def own(self, x: Tensor) -> Tensor:
        """This rank's columns of x [rows, seq]."""
        return x if self.columns is None else torch.cat([x[:, start:stop] for start, stop in self.columns], 1)

    def token_numbers(self) -> Tensor:
        """int64 [t]: which token of the global batch each of this rank's columns is in the first row."""
        first, device = self.first_row * self.tokens.shape[1], self.tokens.device
        columns = self.columns or ((0, self.tokens.shape[1]),)
        return torch.cat([torch.arange(first + start, first + stop, device=device) for start, stop in columns])

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`, copied without blocking where its memory is pinned."""
        if self.tokens.device == device:
            return self
        names = ("tokens", "targets", "weights", "positions", "documents")
        return dataclasses.replace(self, **{n: getattr(self, n).to(device, non_blocking=True) for n in names})
