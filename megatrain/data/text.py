"""Raw text as a source: documents are found by their bytes in the index and made tokens when they are read.

A slot reads the documents that begin in its part of an epoch, by bytes. Where it stands is the byte position of the
document it reads and the tokens of it that are used: two whole numbers, from which any process goes on with the same
tokens, at the price of encoding that document again. What follows cannot be foreseen without encoding, so only who
reads a slot knows where it stands; `slots.merged` puts the places of all together.
"""

import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatrain.base.errors import DataError
from megatrain.data.corpus import Corpus, ShuffledShard
from megatrain.data.rows import Rows
from megatrain.data.shards import Shard

_EPOCHS_WITHOUT_A_DOCUMENT = 100


class Place(NamedTuple):
    """Where a slot stands in a source of text."""

    position: int
    """Bytes of its part that lie before the document it reads, over all epochs."""
    used: int
    """Tokens of that document that were read."""


@dataclass(frozen=True)
class Reading:
    """A document that a slot is in."""

    shard: ShuffledShard
    number: int
    """Of the document in its shard."""
    ids: NDArray[np.uint32]
    """Its tokens, closed by the end of the document; none if it is damaged."""
    after: int
    """Position of what follows."""


@dataclass
class TextReader:
    """Reads the documents of one source for any slots, token by token."""

    corpus: Corpus
    n_slots: int
    tokenizer: Any
    _open: dict[int, tuple[int, Reading]] = field(default_factory=dict)
    """By slot: the position of the document it is in, and the document."""
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
            position, reading = self._document(slot, position, rows)
            n = min(len(reading.ids) - used, rows.seq_len - at)
            if n > 0:
                barren, name = 0, reading.shard.shard
                rows.put_ids(row, at, reading.ids, used, n, name, reading.number)
                at, used = at + n, used + n
            else:
                barren += 1
                self._refuse_endless(slot, barren)
            if used >= len(reading.ids):
                position, used = reading.after, 0
        return Place(position, used)

    def _refuse_endless(self, slot: int, barren: int) -> None:
        if barren > _EPOCHS_WITHOUT_A_DOCUMENT * self.corpus.split.documents:
            raise DataError(f"every document of {self.corpus.name} that slot {slot} reads is damaged: copy it again")

    def _document(self, slot: int, position: int, rows: Rows) -> tuple[int, Reading]:
        """The document at `position`, or the first one after it, and its own position."""
        known = self._open.get(slot)
        if known is not None and known[0] == position:
            return known
        found, shard, place, after = self.corpus.next_document(slot, self.n_slots, position)
        number = int(shard.order[place])
        if shard.damaged(place, place + 1) is None:
            (ids,) = self.tokenizer.encode_documents([self.text(shard.shard, number)])
        else:
            rows.leave_out(shard.shard, number)
            ids = np.zeros(0, dtype=np.uint32)
        self._open[slot] = found, Reading(shard, number, ids, after)
        return self._open[slot]

    def text(self, shard: Shard, number: int) -> str:
        """The text of a document whose bytes were checked."""
        if shard.name not in self._is_json:
            self._is_json[shard.name] = shard.column("is_json")
        return text_of(shard.tokens(number).tobytes(), bool(self._is_json[shard.name][number]), self.corpus.split)


def text_of(content: bytes, is_json: bool, split: Any) -> str:
    """The text in the bytes of a document, which were looked at when they were indexed."""
    text = content.decode("utf-8-sig")
    return json.loads(text)[split.text_field] if is_json else text
