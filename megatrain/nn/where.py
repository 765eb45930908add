"""What a layer must know of the tokens besides their hidden states; made once a forward pass, shared by all layers."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatrain.nn.dropout import Noise


@dataclass
class KeyValueCache:
    """Keys and values of the tokens seen so far, for decoding one token after another.

    Filled layer by layer; `length` moves once a forward pass, by the decoder.
    """

    capacity: int
    length: int = 0
    keys: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)

    def extend(self, layer: str, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v [b, g, t, k] of `layer` and return all so far, [b, g, length + t, k].

        Raises:
            ValueError: more than `capacity` tokens.
        """
        stop = self.length + k.shape[2]
        if stop > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens and {stop} were given: make it larger")
        for store, new in ((self.keys, k), (self.values, v)):
            if layer not in store:
                store[layer] = new.new_empty((*new.shape[:2], self.capacity, new.shape[3]))
            store[layer][:, :, self.length : stop] = new
        return self.keys[layer][:, :, :stop], self.values[layer][:, :, :stop]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows of the batch, in this order; a row may be kept twice (beam search does)."""
        for store in (self.keys, self.values):
            for layer, kept in store.items():
                store[layer] = kept[torch.tensor(rows, dtype=torch.int64, device=kept.device)]


@dataclass(frozen=True)
class Borders:
    """Where documents begin in rows laid end to end, for kernels that go from document to document without a mask.

    The i-th document has the tokens from `starts[i]` up to `starts[i + 1]`; there may be none.
    """

    starts: Tensor
    """int32 [n + 1]; the last is the number of all tokens."""
    longest: int
    """No document has more tokens."""


@dataclass
class Where:
    """Positions and documents of the tokens, and what attention and position scheme prepared from them.

    `positions` int64 [b, t] count within a document; `documents` int32 [b, t] number the documents of a row.
    """

    positions: Tensor
    documents: Tensor
    most_documents: int | None = 1
    """No row holds more documents; None: it is not known."""
    by_documents: bool = False
    """Attention may be given `Borders` instead of a mask: its kernel goes from document to document."""
    mask: Any = None
    """bool [b, 1, t, s], True where a query sees a key (in a ring, such a mask for each step); or
    `Borders`; None: plain causal attention over the row."""
    tables: Any = None
    """What the position scheme prepared (for rotary: cosines and sines)."""
    cache: KeyValueCache | None = None
    noise: Noise | None = None
    """What dropout is drawn from; None where nothing is dropped (evaluation, generation)."""

    @property
    def packed(self) -> bool:
        """Some row may hold more than one document."""
        return self.most_documents != 1

    def within(self, name: str) -> "Where":
        """What the part of the model called `name` is given: noise of its own."""
        return self if self.noise is None else dataclasses.replace(self, noise=self.noise.within(name))

    def visible(self, visible: Any) -> Tensor:
        """The mask [b, 1, t, s] of an attention kind, from its rule on positions and from document borders."""
        q, k = self.positions[:, :, None], self.positions[:, None, :]
        same = self.documents[:, :, None] == self.documents[:, None, :]
        return (visible(q, k) & same)[:, None]

    def limits(self, visible: Any) -> "Tensor | Borders":
        """What keeps a query from keys, in the form that the kernel takes."""
        return self.borders() if self.by_documents and self.most_documents else self.visible(visible)

    def borders(self) -> Borders:
        """Where the documents of all rows begin, found without waiting for the device.

        Every row has as many places; where it has fewer documents, the last ones are empty.
        """
        assert self.most_documents is not None
        rows, t = self.documents.shape
        numbers = torch.arange(self.most_documents, dtype=torch.int32, device=self.documents.device).expand(rows, -1)
        begins = torch.searchsorted(self.documents.contiguous(), numbers.contiguous(), out_int32=True)
        begins += t * torch.arange(rows, dtype=torch.int32, device=begins.device)[:, None]
        starts = F.pad(begins.flatten(), (0, 1), value=rows * t)
        torch._dynamo.maybe_mark_dynamic(starts, 0)  # one graph serves any number of places
        return Borders(starts, t)

    @classmethod
    def decoding(cls, start: int, n_new: int, batch: int, device: torch.device, cache: KeyValueCache) -> "Where":
        """`n_new` tokens that follow `start` cached ones, all of one document."""
        positions = torch.arange(start, start + n_new, device=device).expand(batch, -1)
        return cls(positions, torch.zeros_like(positions, dtype=torch.int32), cache=cache)
