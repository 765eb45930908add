"""Which family our model is written as, and all rows of that family's table for it."""

from dataclasses import replace
from typing import Any

from megatrain.base.errors import CheckpointError, ConfigError, did_you_mean
from megatrain.checkpoint.read import Commit
from megatrain.convert.families import FAMILY
from megatrain.convert.table import Row, expanded

PREFERRED = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox")
"""Where a model can be of several families, the first is taken."""


def sizes_of(choice: Any) -> dict[str, int]:
    """What tables call the widths of joined tensors."""
    k = choice.width_of_head
    return {"q": choice.n_heads * k, "kv": choice.kv_heads * k, "ff": choice.d_ff, "head_dim": k}


def rows_of(family: Any, choice: Any, n_tokens: int | None = None) -> list[Row]:
    """A row for every tensor of our model.

    Args:
        n_tokens: of the vocabulary, on the way out: other rows of the embedding and the head stay here.
    """
    head = [] if choice.tie_embeddings else [Row.of("head.weight", family.untied)]
    rows = [*expanded(family.rows(choice), {"i": choice.n_layers}), *head]
    return [replace(row, n_tokens=n_tokens) if row.ours in ("embedding.weight", "head.weight") else row for row in rows]


def converted_from(commit: Commit) -> dict[str, Any]:
    """The entry of its lineage that says which family the model of `commit` came from; empty if it began here."""
    lineage = commit.manifest.facts.get("lineage", [])
    return next((line for line in lineage if isinstance(line, dict) and "family" in line), {})


def family_for(choice: Any, commit: Commit, wanted: str | None) -> str:
    """The family that the model of `commit` is written as: the one asked for, else the one that it was converted from,
    else the first that it can be.

    Raises:
        ConfigError: there is no such family.
        CheckpointError: the model cannot be of it, or of any.
    """
    known = sorted(FAMILY.kinds(), key=lambda kind: (PREFERRED.index(kind) if kind in PREFERRED else 99, kind))
    if wanted is not None and wanted not in known:
        raise ConfigError(f"family={wanted}: {did_you_mean(wanted, known)}")
    origin = converted_from(commit).get("family")
    tried = [wanted] if wanted else ([origin] if origin in known else []) + known
    reasons = {kind: FAMILY[kind]().unsupported_reasons(choice) for kind in tried}
    for kind, found in reasons.items():
        if not found:
            return kind
    refused = f"this model cannot be written as {wanted}" if wanted else "this model is of no family here"
    raise CheckpointError("\n".join([f"{refused}:", *(f"{k}: {'; '.join(r)}" for k, r in reasons.items())]))
