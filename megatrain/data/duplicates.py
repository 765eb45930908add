"""Documents that were there before, word for word or nearly.

Near duplicates are found by MinHash signatures of the sets of five-word runs (Broder 1997, "On the resemblance and
containment of documents") in bands of a locality-sensitive hash; datasketch does both. A pair that shares a band is
compared by its signatures, so bands may be generous: what they bring up wrongly costs a comparison, not a document.
"""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatrain.base.errors import DataError
from megatrain.base.optional import optional
from megatrain.data.words import gram_hashes

_PERMUTATIONS = 128
_SHINGLE = 5  # words
_MISSED = 0.01  # share of the pairs exactly at the threshold that share no band

Signature = NDArray[np.uint32]


def content_digest(text: str) -> bytes:
    """Equal for texts that differ at most in white space at their ends."""
    return hashlib.blake2b(text.strip().encode(), digest_size=16).digest()


def require_datasketch() -> Any:
    """The package, or a `DataError` that says how to get it."""
    package = optional("datasketch")
    if not package:
        raise DataError(
            f"near duplicates are found with datasketch, which cannot be used ({package.why_not}): "
            "pip install 'megatrain[clean]', or look for exact duplicates only with --near 0"
        )
    return package


def signature(hashes: NDArray[np.uint64]) -> Signature:
    """The MinHash signature [128] of a document with these `word_hashes`; one of few words is compared word by word."""
    grams = np.unique(gram_hashes(hashes, _SHINGLE) if len(hashes) >= _SHINGLE else hashes)
    sketch = require_datasketch().MinHash(_PERMUTATIONS, hashfunc=int, scheme="affine32")
    sketch.update_batch((grams >> np.uint64(32)).tolist())
    return np.asarray(sketch.hashvalues, dtype=np.uint32)


def bands(threshold: float) -> tuple[int, int]:
    """Bands and rows of a band: the longest bands that bring up a pair at the threshold almost surely.

    >>> bands(0.8)
    (21, 6)
    """
    for rows in range(_PERMUTATIONS, 0, -1):
        count = _PERMUTATIONS // rows
        if (1 - threshold**rows) ** count < _MISSED:
            return count, rows
    return _PERMUTATIONS, 1


class Exact:
    """Remembers the content of documents by a digest."""

    def __init__(self) -> None:
        self._seen: dict[bytes, str] = {}

    def find(self, digest: bytes) -> str | None:
        """The id of the document with this content, if there was one."""
        return self._seen.get(digest)

    def add(self, digest: bytes, id: str) -> None:
        self._seen[digest] = id


class Near:
    """Remembers documents by their signatures: a few kilobytes for each."""

    def __init__(self, threshold: float):
        """`threshold`: the least share of the five-word runs of two documents that both have for them to be near."""
        self.threshold = threshold
        package = require_datasketch()
        self._lsh = package.MinHashLSH(num_perm=_PERMUTATIONS, params=bands(threshold))
        self._sketch = package.MinHash
        self._ids: list[str] = []
        self._signatures: list[Signature] = []

    def find(self, signature: Signature) -> tuple[str, float] | None:
        """The id of the nearest document at or above the threshold and the estimated resemblance, if there is one."""
        best: tuple[str, float] | None = None
        for number in sorted(self._lsh.query(self._minhash(signature))):
            resemblance = float((self._signatures[number] == signature).mean())
            if resemblance >= self.threshold and (best is None or resemblance > best[1]):
                best = self._ids[number], resemblance
        return best

    def add(self, signature: Signature, id: str) -> None:
        self._lsh.insert(len(self._ids), self._minhash(signature))
        self._ids.append(id)
        self._signatures.append(signature)

    def _minhash(self, signature: Signature) -> Any:
        return self._sketch(_PERMUTATIONS, hashvalues=signature, scheme="affine32")
