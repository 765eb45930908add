"""What is in a data set, for people and for scripts: counts, lengths, frequent tokens, a few documents."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatrain.base.units import show_bytes, show_count
from megatrain.data.manifest import Manifest, Split
from megatrain.data.shards import Shard
from megatrain.data.tokenizer import Tokenizer

_SAMPLE_TOKENS = 2**24  # tokens that are counted for the table of frequent ones
_EXAMPLE_TOKENS = 80


def summarize(folder: Path, examples: int = 3, frequent: int = 20) -> dict[str, Any]:
    """The facts of a data set as JSON values.

    Args:
        folder: of the data set.
        examples: documents to show of each split, from all over it.
        frequent: rows of the table of most frequent tokens, which is counted over a sample of the documents.

    Raises:
        DataError: there is no data set, or a file of it is missing.
    """
    manifest = Manifest.read(folder)
    tokenizer = Tokenizer.open(folder / manifest.tokenizer.file, manifest.tokenizer.end_of_document)
    splits = {}
    for name, split in manifest.splits.items():
        shards = [Shard.of(folder, entry, manifest.dtype) for entry in split.shards]
        splits[name] = {
            **_counts(split),
            "length": _lengths(shards),
            "frequent": _frequent(shards, tokenizer, frequent),
            "examples": _examples(shards, tokenizer, examples),
        }
    return {
        "name": manifest.name,
        "dtype": manifest.dtype,
        "vocab_size": manifest.tokenizer.vocab_size,
        "tokenizer": manifest.tokenizer.fingerprint,
        "splits": splits,
        "provenance": manifest.provenance,
    }


def drawn(facts: dict[str, Any]) -> Iterator[str]:
    """The facts that `summarize` found, as lines for a terminal."""
    yield f"{facts['name']}: vocabulary of {facts['vocab_size']:,}, ids are {facts['dtype']}"
    yield f"tokenizer {facts['tokenizer'][:16]}"
    for name, split in facts["splits"].items():
        yield ""
        counts = f"{split['documents']:,} documents, {show_count(split['tokens'])} tokens, {split['shards']} shards"
        yield f"{name}: {counts}"
        if not split["documents"]:
            continue
        length = split["length"]
        yield f"  {show_bytes(split['text_bytes'])} of text, {split['bytes_per_token']:.3f} bytes per token"
        yield "  tokens of a document: " + ", ".join(
            f"{key} {length[key]:,.0f}" for key in ("min", "p10", "median", "mean", "p90", "max")
        )
        most = max(row["documents"] for row in length["histogram"])
        for row in length["histogram"]:
            bar = "█" * -(-40 * row["documents"] // most)
            yield f"  {row['from']:>9,} to {row['below'] - 1:>9,} {bar} {row['documents']:,}"
        if split["frequent"]:
            named = (f"{row['token']!r} {row['share']:.1%}" for row in split["frequent"])
            yield "  frequent: " + "  ".join(named)
        for example in split["examples"]:
            yield f"  {example['id']} ({example['tokens']:,} tokens): {example['begins']!r}"


def _counts(split: Split) -> dict[str, Any]:
    return {
        "documents": split.documents,
        "tokens": split.tokens,
        "text_bytes": split.text_bytes,
        "bytes_per_token": split.text_bytes / split.tokens if split.tokens else None,
        "shards": len(split.shards),
    }


def _lengths(shards: list[Shard]) -> dict[str, Any]:
    """Of documents in tokens: quantiles, and how many lie in each [2**i, 2**(i + 1))."""
    if not shards:
        return {}
    lengths = np.concatenate([shard.length for shard in shards])
    powers = np.log2(lengths).astype(int)
    quantiles = {"min": 0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1}
    values = np.quantile(lengths, list(quantiles.values()))
    return {
        "mean": float(lengths.mean()),
        **{name: round(value) for name, value in zip(quantiles, values.tolist(), strict=True)},
        "histogram": [
            {"from": 2**power, "below": 2 ** (power + 1), "documents": int((powers == power).sum())}
            for power in range(powers.min(), powers.max() + 1)
        ],
    }


def _frequent(shards: list[Shard], tokenizer: Tokenizer, rows: int) -> list[dict[str, Any]]:
    """The most frequent tokens, with their share of all tokens counted."""
    counts: NDArray[np.int64] = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    tokens = sum(shard.entry.tokens for shard in shards)
    stride = max(1, round(tokens / _SAMPLE_TOKENS))
    for shard in shards:
        for number in range(0, shard.entry.documents, stride):
            found = np.bincount(shard.tokens(number), minlength=len(counts))
            counts += found[: len(counts)]  # an id beyond the vocabulary is for `verify` to name
    total = max(1, int(counts.sum()))
    best = [i for i in np.argsort(-counts, kind="stable")[:rows].tolist() if counts[i]]
    return [{"id": i, "token": tokenizer.name_of(i), "share": int(counts[i]) / total} for i in best]


def _examples(shards: list[Shard], tokenizer: Tokenizer, n: int) -> list[dict[str, Any]]:
    """The beginnings of documents, equally far from each other."""
    numbered = [(shard, number) for shard in shards for number in _spread(shard.entry.documents, n)]
    found = []
    for shard, number in (numbered[i] for i in _spread(len(numbered), n)):
        tokens = shard.tokens(number)
        text = tokenizer.decode(tokens[:_EXAMPLE_TOKENS])
        found.append({"id": shard.document_id(number), "tokens": len(tokens), "begins": text.rstrip("\ufffd")})
    return found


def _spread(length: int, n: int) -> list[int]:
    """At most `n` different places in range(length), first to last."""
    return sorted({i * length // n for i in range(n)}) if length and n else []
