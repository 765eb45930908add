"""The tokenizer that a checkpoint's model was trained with, found where it was kept and proven by its fingerprint."""

from pathlib import Path

from megatrain.base.errors import DataError
from megatrain.checkpoint.manifest import digest_of
from megatrain.checkpoint.model import config_of
from megatrain.checkpoint.read import Commit
from megatrain.checkpoint.remote import open_storage
from megatrain.data.manifest import TOKENIZER
from megatrain.data.tokenizer import Tokenizer


def tokenizer_of(commit: Commit) -> tuple[Tokenizer, bytes]:
    """The tokenizer, and its file's content.

    It is kept with the checkpoint or the run, so that they can be moved; else it is the one of the run's data.

    Raises:
        DataError: the checkpoint names none, or the one it names is not found.
    """
    told = commit.manifest.facts.get("tokenizer")
    entry = told if isinstance(told, dict) else {"fingerprint": told}
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
    remedy = f"put the {TOKENIZER} of its data set (sha256 {entry['fingerprint']}) into {step}"
    if found:
        raise DataError(f"{found[0]} is not the tokenizer that {step} was trained with: {remedy}")
    raise DataError(f"the tokenizer of {step} is in none of {', '.join(places)}: {remedy}")
