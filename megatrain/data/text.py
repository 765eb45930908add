"""Raw text as a source: documents are found by their bytes in the index and made tokens when they are read.

A slot reads the documents that begin in its part of an epoch, by bytes. Where it stands is the byte position of the
document it reads and the tokens of it that are used: two whole numbers, from which any process goes on with the same
tokens, at the price of encoding that document again. What follows cannot be foreseen without encoding, so only who
reads a slot knows where it stands; `slots.merged` puts the places of all together.
"""

import itertools
import json
from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatrain.base.errors import DataError
from megatrain.data.corpus import Corpus, ShuffledShard
from megatrain.data.rows import Rows
from megatrain.data.shards import Shard

_EPOCHS_WITHOUT_A_DOCUMENT = 100
_AHEAD = 8 * 4  # bytes that are encoded ahead for each token of a row: eight rows of text of usual density


class Place(NamedTuple):
    """Where a slot stands in a source of text."""

    position: int
    """Bytes of its part that lie before the document it reads, over all epochs."""
    used: int
    """Tokens of that document that were read."""


@dataclass(frozen=True)
class Reading:
    """A document that a slot is in, or comes to next."""

    asked: int
    """Where it was looked for."""
    position: int
    """Where it begins, or `asked` after one that reaches into the slot's part."""
    shard: ShuffledShard
    number: int
    """Of the document in its shard."""
    after: int
    """Position of what follows."""
    ids: NDArray[np.uint32] | None
    """Its tokens, closed by the end of the document; None if it is damaged."""

    @property
    def n_tokens(self) -> int:
        return 0 if self.ids is None else len(self.ids)


class _Found(NamedTuple):
    """A document that a slot comes to, not encoded yet."""

    slot: int
    asked: int
    position: int
    shard: ShuffledShard
    place: int
    after: int

    @property
    def number(self) -> int:
        return int(self.shard.order[self.place])


@dataclass
class TextReader:
    """Reads the documents of one source for any slots, token by token."""

    corpus: Corpus
    n_slots: int
    tokenizer: Any
    _open: dict[int, Reading] = field(default_factory=dict)
    """By slot: the document it is in."""
    _ahead: dict[int, deque[Reading]] = field(default_factory=dict)
    """By slot: the documents that follow, encoded already."""
    _is_json: dict[str, NDArray[np.int64]] = field(default_factory=dict)

    @classmethod
    def of(cls, corpus: Corpus, n_slots: int) -> "TextReader":
        """A reader with the tokenizer of the data set.

        Raises:
            DataError: its file is missing, or is not the one that the manifest names.
        """
        from megatrain.data.tokenizer import Tokenizer  # a worker that reads token shards starts without it

        entry, content = corpus.manifest.tokenizer, corpus.tokenizer_file()
        if content is None:
            raise DataError(
                f"{corpus.name} is raw text and its {entry.file} is missing: bring it back, or index the text again"
            )
        tokenizer = Tokenizer.parse(content, f"{corpus.name}/{entry.file}", entry.end_of_document)
        if tokenizer.fingerprint != entry.fingerprint:
            raise DataError(
                f"{corpus.name}/{entry.file} is not the tokenizer that the manifest names (sha256 "
                f"{tokenizer.fingerprint[:12]}, not {entry.fingerprint[:12]}): bring that one back"
            )
        return cls(corpus, n_slots, tokenizer)

    def fill(self, rows: Rows, row: int, slot: int, place: Place) -> Place:
        """Write what `slot` reads from `place` on into `row`; returns the place after it."""
        at, (position, used) = 0, place
        barren = 0
        while at < rows.seq_len:
            reading = self._document(slot, position, rows)
            position = reading.position
            n = min(reading.n_tokens - used, rows.seq_len - at)
            if n > 0 and reading.ids is not None:
                barren, name = 0, reading.shard.shard
                rows.put_ids(row, at, reading.ids, used, n, name, reading.number)
                at, used = at + n, used + n
            else:
                barren += 1
                self._refuse_endless(slot, barren)
            if used >= reading.n_tokens:
                position, used = reading.after, 0
        return Place(position, used)

    def _refuse_endless(self, slot: int, barren: int) -> None:
        if barren > _EPOCHS_WITHOUT_A_DOCUMENT * self.corpus.split.documents:
            raise DataError(f"every document of {self.corpus.name} that slot {slot} reads is damaged: copy it again")

    def _document(self, slot: int, position: int, rows: Rows) -> Reading:
        """The document at `position`, or the first one after it."""
        known = self._open.get(slot)
        if known is not None and known.position == position:
            return known
        ahead = self._ahead.setdefault(slot, deque())
        if not ahead or ahead[0].asked != position:
            ahead.clear()
            self._read_ahead(slot, position, _AHEAD * rows.seq_len)
        reading = self._open[slot] = ahead.popleft()
        if reading.ids is None:
            rows.leave_out(reading.shard.shard, reading.number)
        return reading

    def _read_ahead(self, slot: int, position: int, window: int) -> None:
        """Encode what all slots read next, about `window` bytes of each: enough for all threads of the tokenizer.

        The other slots are about as far as this one, which has come to the end of what was encoded for it.
        """
        found: list[_Found] = []
        for other, ahead in self._ahead.items():
            begin, end = (ahead[0].asked, ahead[-1].after) if ahead else (self._upto(other),) * 2
            if other == slot:
                begin = end = position
            while begin is not None and end is not None and end < begin + window:
                found.append(_Found(other, end, *self.corpus.next_document(other, self.n_slots, end)))
                end = found[-1].after
        sound = [one.shard.damaged(one.place, one.place + 1) is None for one in found]
        texts = [self.text(one.shard.shard, one.number) for one in itertools.compress(found, sound)]
        encoded = iter(self.tokenizer.encode_documents(texts))
        for one, is_sound in zip(found, sound, strict=True):
            ids = next(encoded) if is_sound else None
            self._ahead[one.slot].append(Reading(one.asked, one.position, one.shard, one.number, one.after, ids))

    def _upto(self, slot: int) -> int | None:
        """Where the document ends that a slot is in."""
        return self._open[slot].after if slot in self._open else None

    def text(self, shard: Shard, number: int) -> str:
        """The text of a document whose bytes were checked."""
        if shard.name not in self._is_json:
            self._is_json[shard.name] = shard.column("is_json")
        return text_of(shard.tokens(number).tobytes(), bool(self._is_json[shard.name][number]), self.corpus.split)


def text_of(content: bytes, is_json: bool, split: Any) -> str:
    """The text in the bytes of a document, which were looked at when they were indexed."""
    text = content.decode("utf-8-sig")
    return json.loads(text)[split.text_field] if is_json else text
