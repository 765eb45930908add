"""Text to token ids and back: a tokenizer.json of the `tokenizers` package, opened so that nothing is lost or cut.

A file made for chat or classification may truncate, pad, add special tokens or read a special token's name in the
text as the token itself. For a corpus each of these is a silent loss, so `Tokenizer.open` turns them off.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from megatrain.base.errors import DataError, did_you_mean

END_OF_DOCUMENT = "<|endoftext|>"
_KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<eod>")
SMALLEST_VOCABULARY = 257  # every byte, and the end of a document


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer for documents. Equal fingerprints give equal ids for equal text."""

    fingerprint: str
    """sha256 of the tokenizer's file."""
    end_of_document: int
    """The id that closes each document; no text encodes to it."""
    backend: Any = field(repr=False, compare=False)

    @classmethod
    def open(cls, path: Path, end_of_document: str | int | None = None) -> Self:
        """The tokenizer in a tokenizer.json.

        Args:
            path: a file of the `tokenizers` package, ours or one that came with a model.
            end_of_document: the token that ends a document, or its id; None looks for one of the usual names.

        Raises:
            DataError: there is no such file, it is no tokenizer, or it has no such token.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"the tokenizer {path} cannot be read ({error.strerror}): give the path of a tokenizer.json"
            ) from error
        return cls.parse(content, str(path), end_of_document)

    @classmethod
    def parse(cls, content: bytes, origin: str, end_of_document: str | int | None = None) -> Self:
        """A tokenizer from the bytes of its file; `origin` names it in errors."""
        try:
            backend = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the package raises plain Exception
            raise DataError(
                f"{origin} is not a tokenizer ({error}): give a tokenizer.json of the tokenizers package; where it is "
                "a data set's own, bring that file back"
            ) from error
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # a document that spells "<|endoftext|>" must not end there
        end = _end_of_document(backend, origin, end_of_document)
        return cls(hashlib.sha256(content).hexdigest(), end, backend)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id; ids may have gaps."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def put_in_front(self) -> list[int]:
        """What the tokenizer's own file puts before a text where special tokens are asked for; often nothing."""
        bare = self.encode("a")
        full = self.backend.encode("a", add_special_tokens=True).ids
        starts = range(len(full) - len(bare) + 1)
        return full[: next((i for i in starts if full[i : i + len(bare)] == bare), 0)]

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without any special token."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_documents(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        """The ids of each text, each closed by the end-of-document token."""
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*encoding.ids, self.end_of_document], dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of `ids`; special tokens are shown by name, or left out.

        Bytes that are no UTF-8 yet (the end of a sample may stand within a character) become U+FFFD.
        """
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=not special)

    def name_of(self, i: int) -> str:
        """How one token reads: its text, or its name where it is special or no whole character."""
        text = self.decode([i])
        return text if text and "\ufffd" not in text else (self.backend.id_to_token(i) or f"<{i}>")


def with_in_front(content: bytes, token: int) -> bytes:
    """A tokenizer's file that puts the special `token`, alone, before each text; the same bytes if it does so already.

    So other programs read a text as our models have read documents: behind the token that ended the one before.
    """
    backend: Any = tokenizers.Tokenizer.from_str(content.decode())
    if Tokenizer("", token, backend).put_in_front == [token]:
        return content
    backend.post_processor = _in_front(backend.id_to_token(token), token)
    return backend.to_str(pretty=True).encode() + b"\n"


def _in_front(name: str, token: int) -> Any:
    return processors.TemplateProcessing(single=[name, "$A"], pair=[name, "$A", "$B:1"], special_tokens=[(name, token)])


def _end_of_document(backend: tokenizers.Tokenizer, origin: str, wanted: str | int | None) -> int:
    if isinstance(wanted, int):
        if backend.id_to_token(wanted) is None:
            raise DataError(
                f"{origin} has no token of id {wanted}, which is to end documents: take the tokenizer that belongs to "
                "what names this id (a data set, a checkpoint, or eos_token_id in a config.json), or correct it there"
            )
        return wanted
    for token in (wanted,) if wanted else _KNOWN_ENDS:
        found = backend.token_to_id(token)
        if found is not None:
            return found
    special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    if wanted:
        raise DataError(f"{origin} has no token {wanted!r} to end documents with: {did_you_mean(wanted, special)}")
    raise DataError(
        f"{origin} has none of the usual end-of-document tokens ({', '.join(_KNOWN_ENDS)}): name one with "
        f"--end-of-document; its special tokens are {', '.join(special) or 'none'}"
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a byte-level BPE tokenizer; the bytes of its file depend on the texts and `vocab_size` alone.

    Every byte is in the vocabulary, so that any text encodes and decodes to itself. Few texts may not have
    `vocab_size` tokens in them; then there are fewer.

    Raises:
        DataError: `vocab_size` has no room for all bytes.

    Paper: Sennrich et al. 2016, arXiv:1508.07909; over bytes as in Radford et al. 2019 (GPT-2), section 2.2.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(
            f"vocab_size={vocab_size} is too small: a byte-level tokenizer has 256 bytes and the end of a document, "
            f"so take at least {SMALLEST_VOCABULARY}"
        )
    backend: Any = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(iter(texts), trainer)
    backend.post_processor = _in_front(END_OF_DOCUMENT, backend.token_to_id(END_OF_DOCUMENT))
    return backend.to_str(pretty=True).encode() + b"\n"
