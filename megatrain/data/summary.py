"""What is in a data set, for people and for scripts: counts, lengths, frequent tokens, a few documents."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatrain.base.errors import DataError
from megatrain.base.units import show_bytes, show_count
from megatrain.data.corpus import Access, Corpus, read_manifest
from megatrain.data.manifest import TEXT, Split
from megatrain.data.shards import Shard, Tokens
from megatrain.data.text import TextReader
from megatrain.data.tokenizer import Tokenizer

_SAMPLE_TOKENS = 2**24  # tokens that are counted for the table of frequent ones
_SAMPLE_DOCUMENTS = 200
_EXAMPLE_TOKENS = 80


def summarize(address: str, examples: int = 3, frequent: int = 20, access: Access | None = None) -> dict[str, Any]:
    """The facts of a data set as JSON values. Lengths are in tokens, of raw text in bytes.

    Args:
        address: of the data set: a folder, or where it is remote.
        examples: documents to show of each split, from all over it.
        frequent: rows of the table of most frequent tokens, which is counted over a sample of the documents.

    Raises:
        DataError: there is no data set, or a file of it is missing.
    """
    access = access or Access()
    manifest = read_manifest(address, access.store(address))
    splits = {name: _counts(split) for name, split in manifest.splits.items()}
    for name, split in manifest.splits.items():
        if not split.documents:
            continue
        corpus = Corpus(address, name, 0, access.cache, access.allow_pipe, manifest)
        reader = _Reader(corpus)
        splits[name] |= {
            "length": _lengths(corpus.shards),
            "frequent": reader.frequent(frequent),
            "examples": reader.examples(examples),
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
        is_text = split["form"] == TEXT
        tokens = "raw text" if is_text else f"{show_count(split['tokens'])} tokens"
        yield f"{name}: {split['documents']:,} documents, {tokens}, {split['shards']} shards"
        if not split["documents"]:
            continue
        length = split["length"]
        ratio = "" if is_text else f", {split['bytes_per_token']:.3f} bytes per token"
        yield f"  {show_bytes(split['text_bytes'])} of text{ratio}"
        yield f"  {'bytes' if is_text else 'tokens'} of a document: " + ", ".join(
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
        "form": split.form,
        "documents": split.documents,
        "tokens": split.tokens,
        "text_bytes": split.text_bytes,
        "bytes_per_token": split.text_bytes / split.tokens if split.tokens else None,
        "shards": len(split.shards),
    }


def _lengths(shards: list[Shard]) -> dict[str, Any]:
    """Of documents: quantiles, and how many lie in each [2**i, 2**(i + 1))."""
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


class _Reader:
    """Documents of a corpus as token ids, whatever form they have and wherever they are."""

    def __init__(self, corpus: Corpus):
        self.corpus, self.text = corpus, TextReader.of(corpus, 1) if corpus.split.is_text else None
        entry, content = corpus.manifest.tokenizer, corpus.tokenizer_file()
        if content is None:
            raise DataError(f"{corpus.name}/{entry.file} is missing: bring it back, or build the data set again")
        self.tokenizer = Tokenizer.parse(content, f"{corpus.name}/{entry.file}", entry.end_of_document)

    def tokens(self, shard: Shard, number: int) -> Tokens:
        """The ids of a document, its end included; what is damaged is for `verify` to name."""
        shard.damaged(number)  # which brings a remote one here
        if self.text is None:
            return shard.tokens(number)
        return self.tokenizer.encode_documents([self.text.text(shard, number)])[0]

    def frequent(self, rows: int) -> list[dict[str, Any]]:
        """The most frequent tokens, with their share of all tokens counted."""
        counts: NDArray[np.int64] = np.zeros(self.tokenizer.vocab_size, dtype=np.int64)
        for shard, number in self._sample():
            found = np.bincount(self.tokens(shard, number), minlength=len(counts))
            counts += found[: len(counts)]  # an id beyond the vocabulary is for `verify` to name
        total = max(1, int(counts.sum()))
        best = [i for i in np.argsort(-counts, kind="stable")[:rows].tolist() if counts[i]]
        return [{"id": i, "token": self.tokenizer.name_of(i), "share": int(counts[i]) / total} for i in best]

    def _sample(self) -> Iterator[tuple[Shard, int]]:
        """Documents from all over: few where each has to be fetched or encoded."""
        split = self.corpus.split
        if self.text is None and all(type(shard) is Shard for shard in self.corpus.shards):
            stride = max(1, round(split.tokens / _SAMPLE_TOKENS))
        else:
            stride = max(1, split.documents // _SAMPLE_DOCUMENTS)
        for shard in self.corpus.shards:
            yield from ((shard, number) for number in range(0, shard.entry.documents, stride))

    def examples(self, n: int) -> list[dict[str, Any]]:
        """The beginnings of documents, equally far from each other."""
        numbered = [(s, number) for s in self.corpus.shards for number in _spread(s.entry.documents, n)]
        found = []
        for shard, number in (numbered[i] for i in _spread(len(numbered), n)):
            tokens = self.tokens(shard, number)
            begins = self.tokenizer.decode(tokens[:_EXAMPLE_TOKENS]).rstrip("\ufffd")
            found.append({"id": shard.document_id(number), "tokens": len(tokens), "begins": begins})
        return found


def _spread(length: int, n: int) -> list[int]:
    """At most `n` different places in range(length), first to last."""
    return sorted({i * length // n for i in range(n)}) if length and n else []
