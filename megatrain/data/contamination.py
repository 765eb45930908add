"""Evaluation sets inside the training text, found by runs of words that both have.

As for GPT-3 (Brown et al. 2020, arXiv:2005.14165, appendix C) a run of 13 words in common is evidence. Differs: a
sentence of an evaluation set that is shorter is looked for as a whole, so that one that was copied is found whatever
its length (from `shortest` words on: below that a sentence is anyone's), and the words are compared, not only hashes.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatrain.base.errors import DataError
from megatrain.data.compression import read_whole
from megatrain.data.documents import Refused
from megatrain.data.sources import chunks_of, find_sources, suffix_of
from megatrain.data.words import gram_hashes, sentences, word_hashes, words


@dataclass(frozen=True)
class Hit:
    """A passage of an evaluation set found in a document."""

    item: str
    """Where it is from, FILE:LINE."""
    passage: str
    """Its words."""


class Benchmarks:
    """All runs of words of some evaluation sets."""

    def __init__(self, items: Iterable[tuple[str, str]], n: int = 13, shortest: int = 6):
        """`items` are (name, text); runs have `n` words, or as many as a shorter sentence of at least `shortest`."""
        self.n, self.shortest = n, shortest
        self._passages: dict[int, tuple[str, tuple[str, ...]]] = {}
        lengths: dict[int, set[int]] = {}
        for name, text in items:
            for length, passage in self._runs(text):
                (number,) = gram_hashes(word_hashes(list(passage)), length).tolist()
                self._passages.setdefault(number, (name, passage))
                lengths.setdefault(length, set()).add(number)
        self._numbers: dict[int, NDArray[np.uint64]] = {
            length: np.array(sorted(found), dtype=np.uint64) for length, found in sorted(lengths.items())
        }

    def _runs(self, text: str) -> Iterator[tuple[int, tuple[str, ...]]]:
        found = words(text)
        for begin in range(len(found) - self.n + 1):
            yield self.n, tuple(found[begin : begin + self.n])
        for sentence in sentences(text):
            short = words(sentence)
            if self.shortest <= len(short) < self.n:
                yield len(short), tuple(short)

    def __len__(self) -> int:
        return len(self._passages)

    def find(self, found: list[str], hashes: NDArray[np.uint64]) -> Hit | None:
        """A passage in a document of the words `found`, whose `word_hashes` are `hashes`."""
        for length, numbers in self._numbers.items():
            grams = gram_hashes(hashes, length)
            place = np.searchsorted(numbers, grams).clip(max=len(numbers) - 1)
            for begin in np.flatnonzero(numbers[place] == grams).tolist():
                item, passage = self._passages[int(grams[begin])]
                if tuple(found[begin : begin + length]) == passage:
                    return Hit(item, " ".join(passage))
        return None


def read_benchmarks(paths: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """The texts of evaluation sets with their names: every text value of each JSON line; of other files the documents.

    Raises:
        DataError: a file is missing, or is JSON lines with a line that is not JSON.
    """
    for path in paths:
        for source in find_sources([path]):
            if suffix_of(source.path) == ".jsonl":
                yield from _texts_of_lines(source.path, source.name)
                continue
            for chunk in chunks_of([source], {}):
                for found in chunk.documents():
                    if isinstance(found, Refused):
                        raise DataError(f"the evaluation set {found.id} cannot be read: {found.reason}")
                    yield found.id, found.text


def _texts_of_lines(path: Path, name: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(read_whole(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"line {number} of the evaluation set {path} is not JSON ({error}): mend it") from error
        for text in _texts(record):
            yield f"{name}:{number}", text


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
