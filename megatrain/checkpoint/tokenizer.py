"""The tokenizer that a checkpoint's model was trained with, found where it was kept and proven by its fingerprint."""

from pathlib import Path
from typing import Any

from megatrain.base.errors import DataError
from megatrain.checkpoint.manifest import digest_of
from megatrain.checkpoint.model import config_of, trained_here
from megatrain.checkpoint.read import Commit
from megatrain.checkpoint.remote import open_storage
from megatrain.data.manifest import TOKENIZER
from megatrain.data.tokenizer import Tokenizer

SIDE_FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
"""Kept with a converted model as they are, so that the way back gives them again."""


def side_files(commit: Commit) -> dict[str, bytes]:
    """Those that lie in the checkpoint's folder, by name."""
    found = {}
    for name in SIDE_FILES:
        path = f"{commit.folder}/{name}"
        if (size := commit.storage.size(path)) is not None:
            found[name] = bytes(commit.storage.read(path, 0, size))
    return found


def entry_of(facts: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's facts say of its tokenizer: fingerprint, end_of_document, vocab_size, as far as they do."""
    told = facts.get("tokenizer")
    return told if isinstance(told, dict) else {"fingerprint": told}


def valid_tokens(commit: Commit) -> int:
    """How many rows of the embedding are tokens: all of a converted model's, and the tokenizer's of a trained one's.

    The others only fill up `model.vocab_size`: they were never in a softmax.
    """
    rows: int = commit.manifest.tensors["weights", "embedding.weight"].shape[0]
    if not trained_here(config_of(commit)):
        return rows
    told = entry_of(commit.manifest.facts).get("vocab_size")
    if isinstance(told, int) and 0 < told <= rows:
        return told
    try:  # one that was written when this was not told
        return min(tokenizer_of(commit)[0].vocab_size, rows)
    except DataError:
        return rows


def tokenizer_of(commit: Commit) -> tuple[Tokenizer, bytes]:
    """The tokenizer, and its file's content.

    It is kept with the checkpoint or the run, so that they can be moved; else it is the one of the run's data.

    Raises:
        DataError: the checkpoint names none, or the one it names is not found.
    """
    entry = entry_of(commit.manifest.facts)
    step = commit.storage.describe(commit.folder)
    if not entry.get("fingerprint"):
        raise DataError(
            f"{step} does not say which tokenizer its model was trained with: give a checkpoint that megatrain train "
            "has written, or one that megatrain convert has written from a folder with a tokenizer.json"
        )
    if "://" not in step:
        step = str(Path(step).absolute())
    data = [source["path"] for source in config_of(commit)["data"].get("sources") or []]
    places = [step, *(step.rsplit("/", n)[0] for n in (1, 2)), *data]  # checkpoints lie in RUN/checkpoints/step-...
    found = []
    for place in places:
        storage = open_storage(place)
        if (size := storage.size(TOKENIZER)) is not None:
            content = bytes(storage.read(TOKENIZER, 0, size))
            if digest_of(content) == entry["fingerprint"]:
                return Tokenizer.parse(content, f"{place}/{TOKENIZER}", entry.get("end_of_document")), content
            found.append(f"{place}/{TOKENIZER}")
    remedy = f"put the {TOKENIZER} of its run or data set (sha256 {entry['fingerprint']}) into {step}"
    if found:
        raise DataError(f"{found[0]} is not the tokenizer that {step} was trained with: {remedy}")
    raise DataError(f"the tokenizer of {step} is in none of {', '.join(places)}: {remedy}")
