"""A model to use, from a checkpoint of its training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatrain.base.device import KINDS, Device
from megatrain.base.errors import ConfigError, DataError, did_you_mean
from megatrain.checkpoint.manifest import digest_of
from megatrain.checkpoint.model import build_model, config_of
from megatrain.checkpoint.read import Commit, find, open_storage
from megatrain.data.shards import TOKENIZER
from megatrain.data.tokenizer import Tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Loaded:
    """A trained model with what it needs to read and write text."""

    model: Any
    """In evaluation mode, undivided, on one device; its parameters take no gradients."""
    tokenizer: Tokenizer
    config: dict[str, Any]
    """The run file it was trained by, resolved, as plain values."""
    step: int
    """Optimiser steps it was trained for."""
    seq_len: int
    """Tokens of the sequences it was trained on."""
    device: torch.device


def load(checkpoint: str | Path, *, device: str = "auto", dtype: str = "auto") -> Loaded:
    """The model of a checkpoint, with its tokenizer.

    Args:
        checkpoint: a checkpoint's folder (step-00000100), or a run's folder, whose newest checkpoint is taken; a path,
            or the URL of an object store.
        device: cpu, cuda, or auto: a card where there is one.
        dtype: what the weights are kept and multiplied in: fp32, bf16, or auto: what the run computed in on a card, and
            fp32 on a CPU.

    Raises:
        CheckpointError: it is no checkpoint, it is damaged, or its weights are not this model's.
        ConfigError: its model is of a kind that is not known here; device or dtype is not one of those above.
        DataError: the tokenizer is not found, or is another than the run's.
    """
    commit = find(checkpoint)
    config, tokenizer, placed = config_of(commit), _tokenizer(commit), _device(device)
    model = build_model(commit, n_valid=tokenizer.vocab_size, dtype=_dtype(dtype, placed, config))
    return Loaded(model.to(placed.torch), tokenizer, config, commit.step, config["data"]["seq_len"], placed.torch)


def _device(wanted: str) -> Device:
    if wanted not in KINDS:
        raise ConfigError(f"device={wanted}: {did_you_mean(wanted, KINDS)}")
    if wanted == "cuda" and Device.of("auto").kind != "cuda":
        raise ConfigError("device=cuda and this machine has no card that torch can use: take cpu, or auto")
    return Device.of(wanted)


def _dtype(wanted: str, device: Device, config: dict[str, Any]) -> torch.dtype:
    if wanted == "auto":
        wanted = config.get("precision", {}).get("compute", "fp32") if device.kind == "cuda" else "fp32"
    if wanted not in DTYPES:
        raise ConfigError(f"dtype={wanted}: {did_you_mean(wanted, ['auto', *DTYPES])}")
    return DTYPES[wanted]


def _tokenizer(commit: Commit) -> Tokenizer:
    """The run's tokenizer: kept with the checkpoint or the run, so that they can be moved; else the one of its data."""
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
                return Tokenizer.parse(content, f"{place}/{TOKENIZER}", entry.get("end_of_document"))
            found.append(f"{place}/{TOKENIZER}")
    remedy = f"put the {TOKENIZER} of its data set (sha256 {entry['fingerprint']}) into {step}"
    if found:
        raise DataError(f"{found[0]} is not the tokenizer that {step} was trained with: {remedy}")
    raise DataError(f"the tokenizer of {step} is in none of {', '.join(places)}: {remedy}")
