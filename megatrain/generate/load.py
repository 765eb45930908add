"""A model to use, from a checkpoint of its training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatrain.base.device import KINDS, Device
from megatrain.base.errors import ConfigError, did_you_mean
from megatrain.checkpoint.model import build_model, config_of
from megatrain.checkpoint.read import find, only_weights
from megatrain.checkpoint.tokenizer import tokenizer_of
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
    commit = find(checkpoint, states=only_weights)
    config, (tokenizer, _), placed = config_of(commit), tokenizer_of(commit), _device(device)
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
