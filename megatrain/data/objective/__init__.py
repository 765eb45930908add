"""What is predicted of a document: a registry of choices.

An objective rewrites the targets of documents, and the weights, before inputs are derived from them; lengths stay, so
the order of the data does not depend on it. Its random choices are a function of the seed, the global batch and the
place in it alone.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatrain.base.errors import ConfigError, did_you_mean
from megatrain.base.registry import Registry
from megatrain.data.order import hashed
from megatrain.data.rows import Rows

Name = str | int
"""A special token: its text in the tokenizer's file, or its id."""


Special = Callable[[], Mapping[str, int]]
"""Asks for the ids of the tokenizer's special tokens by text."""
Seeds = Callable[[int, int], int]
"""The seed of all that is random about the piece at (row, column) of this rank's rows."""


def fractions(seed: int, n: int) -> NDArray[np.float64]:
    """`n` numbers in [0, 1) that depend on the seed alone."""
    return (hashed(seed, n) >> np.uint64(11)).astype(np.float64) / 2**53


class Rewriter(Protocol):
    def rewrite(self, rows: Rows, seeds: Seeds) -> None:
        """Change what `rows` holds."""
        ...


class Objective(Protocol):
    def build(self, special: Special) -> Rewriter: ...


OBJECTIVE: Registry[Any] = Registry("objective", "megatrain.data.objective")


def ids_of(key: str, names: tuple[Name, ...], special: Special) -> list[int]:
    """Ids of special tokens that a run file names.

    Raises:
        ConfigError: the tokenizer has no such token.
    """
    known = special() if any(isinstance(name, str) for name in names) else {}
    missing = [name for name in names if isinstance(name, str) and name not in known]
    if missing:
        raise ConfigError(
            f"{key}: the tokenizer has no special token {name!r}: {did_you_mean(name, known)}; an id may be given too"
            for name in missing
        )
    return [known[name] if isinstance(name, str) else name for name in names]
