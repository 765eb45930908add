"""The undivided model of a checkpoint: the choice in its config, built and filled."""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import nn

from megatrain.base.errors import CheckpointError, ConfigError
from megatrain.checkpoint.compare import differences
from megatrain.checkpoint.read import Commit
from megatrain.config.build import build, flat, plain
from megatrain.config.source import from_plain
from megatrain.models import MODEL
from megatrain.parallel.shard import shards, slices_of

ONLY_IN_TRAINING = ("dropout", "init_std", "position.init_std", "z_loss")
"""Keys of a `model` section that change nothing of what the model computes with given weights."""

SEEN_IN_SHAPES = ("vocab_size",)
"""Keys that tensors' shapes speak of; a section may leave them to the tokenizer."""


@dataclass(frozen=True, kw_only=True)
class _ModelPart:
    model: Annotated[Any, MODEL]


def model_choice(section: dict[str, Any], origin: str) -> Any:
    """The registered choice that a `model` section in plain values describes.

    Raises:
        ConfigError: it describes none.
    """
    part, _ = build(_ModelPart, from_plain({"model": section}, origin))
    return part.model


def config_of(commit: Commit) -> dict[str, Any]:
    """The run file that a checkpoint was trained by, resolved; it names a model and the length of its sequences.

    Raises:
        CheckpointError: there is none in it.
    """
    config: Any = commit.manifest.facts.get("config")
    try:
        if isinstance(config["model"], dict) and type(config["data"]["seq_len"]) is int:
            return config
    except (KeyError, TypeError):
        pass
    raise CheckpointError(
        f"{commit.storage.describe(commit.folder)} does not say which model it holds: give a checkpoint that "
        "megatrain train or megatrain convert has written"
    )


def meaning_of(section: dict[str, Any]) -> dict[str, Any]:
    """What a `model` section says about the function of given weights, by dotted key, defaults filled in.

    A section that can no longer be read is taken as it stands.
    """
    try:
        choice = model_choice(section, "a saved run")
    except ConfigError:
        return flat(section)
    said = flat(plain(choice)) | {"n_kv_heads": choice.kv_heads, "head_dim": choice.width_of_head}
    return {key: value for key, value in said.items() if key not in ONLY_IN_TRAINING + SEEN_IN_SHAPES}


def other_meanings(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Where two `model` sections give the same weights another meaning: both values by dotted key."""
    one, other = meaning_of(a), meaning_of(b)
    return {
        key: (one.get(key), other.get(key))
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
    }


def trained_here(config: dict[str, Any]) -> bool:
    """Whether a checkpoint's config is that of a run of ours, and not of a conversion."""
    return "train" in config


def build_model(commit: Commit, *, n_valid: int | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """The model with the checkpoint's weights, for use on one device: no gradients, no dropout.

    Args:
        n_valid: tokens of the vocabulary; by default every row of the embedding.
    """
    config, where = config_of(commit), commit.storage.describe(commit.folder)
    reader = commit.reader(cast=True)
    choice = model_choice(config["model"], where)
    rows = reader.stored("embedding.weight").shape[0]
    model = choice.build(n_valid=rows if n_valid is None else n_valid, seq_len=config["data"]["seq_len"]).to(dtype)
    held = shards(model)
    if problems := differences(reader.shapes(), {name: shard.full_shape for name, shard in held.items()}):
        raise CheckpointError("\n".join([f"{where} is not of the model in its own config:", *problems]))
    for name, parameter in model.named_parameters():
        for piece in slices_of("weights", name, held[name], parameter.data.view(-1)):
            reader.fill(piece)
    return model.requires_grad_(False).eval()


def shapes_of(choice: Any, n_valid: int, seq_len: int) -> dict[str, tuple[int, ...]]:
    """Full shapes of a model's parameters by name, without memory for them."""
    with torch.device("meta"):
        model: nn.Module = choice.build(n_valid=n_valid, seq_len=seq_len)
    return {name: shard.full_shape for name, shard in shards(model).items()}
