"""Small data sets for the tests of the data's order."""

from pathlib import Path

import numpy as np

from megatrain.data.manifest import HELD_OUT, TRAIN, Manifest, Split, TokenizerEntry
from megatrain.data.shards import ShardWriter

END = 0
VOCAB = 60_000


def documents(n: int, seed: int = 0, mean: int = 60, base: int = 1) -> dict[str, np.ndarray]:
    """Documents of very different lengths by id; each ends with END, and no two ids begin alike."""
    rng = np.random.default_rng(seed)
    lengths = 1 + rng.geometric(1 / mean, size=n)
    return {f"d{seed}/{i}": np.append(rng.integers(base, VOCAB, size=m), END) for i, m in enumerate(lengths)}


def write(
    folder: Path,
    train: dict[str, np.ndarray],
    held_out: dict[str, np.ndarray] | None = None,
    per_shard: int = 50,
    fingerprint: str = "f" * 64,
    vocab_size: int = VOCAB,
) -> Path:
    """A data set of those documents in `folder`."""
    splits = {}
    for name, found in ((TRAIN, train), (HELD_OUT, held_out or {})):
        entries, items = [], list(found.items())
        for number, first in enumerate(range(0, len(items), per_shard)):
            with ShardWriter(folder, name, number, "uint16") as writer:
                for document, tokens in items[first : first + per_shard]:
                    writer.write(document, tokens, text_bytes=4 * len(tokens))
            entries.append(writer.entry)
        splits[name] = Split(tuple(entries))
    Manifest(folder.name, TokenizerEntry(fingerprint, vocab_size, END), "uint16", splits).write(folder)
    return folder
