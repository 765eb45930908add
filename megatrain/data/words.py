"""Text as words, and runs of words as numbers: finds a passage again under other case, spacing and punctuation."""

import hashlib
import re
import unicodedata
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# Scripts that put no space between words: each character counts as a word, or a page would be one.
_UNSPACED = "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_SENTENCE = re.compile(r"[.!?。！？](?=\s|$)|[。！？]|\n\s*\n")
_STEP = 0x9E3779B97F4A7C15  # odd, so that multiplying by it loses nothing modulo 2**64


def words(text: str) -> list[str]:
    """The words of `text` in one form of their letters: without case, punctuation or compatibility variants.

    >>> words("The cat's Hat — ﬁne!")
    ['the', 'cat', 's', 'hat', 'fine']
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def sentences(text: str) -> list[str]:
    """`text` cut after each sentence and at blank lines.

    >>> sentences("One. Two?\\n\\nThree 3.5")
    ['One', ' Two', '', 'Three 3.5']
    """
    return _SENTENCE.split(text)


@lru_cache(maxsize=2**20)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def word_hashes(found: list[str]) -> NDArray[np.uint64]:
    """A 64-bit number for each word, the same on every machine."""
    return np.fromiter(map(_hash, found), dtype=np.uint64, count=len(found))


def gram_hashes(hashes: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """A number for each run of `n` words, in order [max(0, words - n + 1)].

    The number is a polynomial in the words' hashes modulo 2**64: equal runs have equal numbers, wherever they stand.
    """
    count = max(0, len(hashes) - n + 1)
    total = np.zeros(count, dtype=np.uint64)
    for k in range(n):
        total = total * np.uint64(_STEP) + hashes[k : k + count]
    return total
