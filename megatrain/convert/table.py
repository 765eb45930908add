"""What a family's table says: which of our tensors is made of which of theirs, and what each key of a config means."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatrain.base.errors import CheckpointError

NO_EFFECT = frozenset({
    "_name_or_path", "architectures", "attention_dropout", "attn_pdrop", "auto_map", "bos_token_id",
    "chunk_size_feed_forward", "classifier_dropout", "dtype", "embd_pdrop", "eos_token_id",
    "gradient_checkpointing", "hidden_dropout", "id2label", "initializer_range", "is_decoder", "label2id",
    "max_window_layers", "model_type", "n_ctx", "pad_token_id", "pretraining_tp", "problem_type",
    "reorder_and_upcast_attn", "resid_pdrop", "return_dict", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_type", "summary_use_proj", "task_specific_params", "tokenizer_class",
    "torch_dtype", "transformers_version", "unk_token_id", "use_cache",
})  # fmt: skip
"""Keys of Hugging Face configs that change nothing of a decoder's logits."""


ROPE = {
    "default": ("rotary", {}),
    "linear": ("rotary_linear", {"factor": "factor"}),
    "llama3": (
        "rotary_llama3",
        {
            "factor": "factor",
            "original_max_position_embeddings": "original_seq_len",
            "low_freq_factor": "few_turns",
            "high_freq_factor": "many_turns",
        },
    ),
    "yarn": (
        "rotary_yarn",
        {
            "factor": "factor",
            "original_max_position_embeddings": "original_seq_len",
            "beta_slow": "few_turns",
            "beta_fast": "many_turns",
            "attention_factor": "attention_factor",
        },
    ),
}
"""Their kinds of rotary positions: our kind, and our name for each of their keys."""


def their_rope(position: Any) -> dict[str, Any]:
    """Their keys for our rotary section, in both generations: transformers 5 reads the first, 4 the other two."""
    kind, (_, keys) = next((kind, row) for kind, row in ROPE.items() if row[0] == position.kind)
    scaling = {theirs: value for theirs, ours in keys.items() if (value := getattr(position, ours)) is not None}
    return {
        "rope_parameters": {"rope_type": kind, "rope_theta": position.theta, **scaling},
        "rope_theta": position.theta,
        "rope_scaling": {"rope_type": kind, **scaling} if scaling else None,
    }


@dataclass(frozen=True)
class Row:
    """One of our tensors and theirs. `{i}` stands for the layer's number.

    Several of theirs are joined along dimension 0; `widths` names their sizes there ("q", "kv", "ff").
    """

    ours: str
    theirs: tuple[str, ...]
    widths: tuple[str, ...] = ()
    transposed: bool = False
    """Theirs is [in, out]."""
    by_head: int = 0
    """Theirs is [heads, this many pieces, head_dim, ...] and ours has the pieces outermost; 0: no."""

    @classmethod
    def of(cls, ours: str, *theirs: str, **options: Any) -> "Row":
        return cls(ours, theirs, **options)

    def at(self, layer: int) -> "Row":
        theirs = tuple(name.format(i=layer) for name in self.theirs)
        return Row(self.ours.format(i=layer), theirs, self.widths, self.transposed, self.by_head)

    @property
    def in_layer(self) -> bool:
        return "{i}" in self.ours

    def join(self, tensors: Sequence[Tensor], sizes: Mapping[str, int]) -> Tensor:
        """Ours from theirs.

        Raises:
            CheckpointError: one of theirs has another width than the config says.
        """
        tensors = [x.T if self.transposed and x.dim() == 2 else x for x in tensors]
        for name, width, x in zip(self.theirs, self.widths, tensors, strict=bool(self.widths)):
            if x.shape[0] != sizes[width]:
                raise CheckpointError(f"{name} has {x.shape[0]} rows and its config says {sizes[width]}")
        whole = torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]
        if self.by_head:
            whole = whole.unflatten(0, (-1, self.by_head, sizes["head_dim"])).transpose(0, 1).flatten(0, 2)
        return whole.contiguous()

    def split(self, whole: Tensor, sizes: Mapping[str, int]) -> list[Tensor]:
        """Theirs from ours: the way back of `join`."""
        if self.by_head:
            whole = whole.unflatten(0, (self.by_head, -1, sizes["head_dim"])).transpose(0, 1).flatten(0, 2)
        parts = whole.split([sizes[width] for width in self.widths]) if len(self.theirs) > 1 else (whole,)
        return [(x.T if self.transposed and x.dim() == 2 else x).contiguous() for x in parts]


def with_layers(rows: Sequence[Row], n_layers: int) -> Iterator[Row]:
    """All rows of a model: those outside of layers, and those inside once for each."""
    yield from (row for row in rows if not row.in_layer)
    for layer in range(n_layers):
        yield from (row.at(layer) for row in rows if row.in_layer)


@dataclass
class Theirs:
    """A config.json, read key by key. What is not read and may matter is refused: it would be silently lost."""

    values: Mapping[str, Any]
    problems: list[str] = field(default_factory=list)
    read: set[str] = field(default_factory=set)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            self.problems.append(f"{key} is missing")
        return value

    def must(self, key: str, allowed: Sequence[Any], why: str) -> Any:
        """The value of a key for which our model has only the `allowed` values; the first is the family's default."""
        value = self.get(key, allowed[0])
        if value not in allowed:
            self.problems.append(f"{key} is {value!r}: {why} (allowed: {', '.join(map(repr, allowed))})")
        return value

    def rope(self) -> dict[str, Any]:
        """Our rotary section, from either generation of their keys."""
        said = self.get("rope_parameters", {}) | self.get("rope_scaling", {})
        said.pop("rope_interleaved", None)
        kind = said.pop("rope_type", said.pop("type", "default"))
        said.pop("type", None)
        theta = said.pop("rope_theta", self.get("rope_theta", self.get("rotary_emb_base", 10_000.0)))
        share = said.pop("partial_rotary_factor", self.get("rotary_pct", self.get("partial_rotary_factor", 1.0)))
        if share != 1.0:
            self.problems.append(f"only {share} of each head is turned by rotary positions, ours turns all of it")
        if kind not in ROPE:
            self.problems.append(f"rotary positions are scaled by {kind!r}: ours know {', '.join(ROPE)}")
            return {"kind": "rotary"}
        ours, keys = ROPE[kind]
        section = {"kind": ours, "theta": float(theta)}
        section |= {keys[key]: value for key, value in said.items() if key in keys and value is not None}
        if unknown := {
            k: v for k, v in said.items() if k not in keys and v is not None and (k, v) != ("truncate", True)
        }:
            self.problems.append(f"rotary positions of kind {kind} have {unknown}, which ours have not")
        return section

    def finish(self, family: str) -> None:
        """
        Raises:
            CheckpointError: with everything that our model cannot be.
        """
        unknown = {
            k: v for k, v in self.values.items() if k not in self.read | NO_EFFECT and v not in (None, False, [], {})
        }
        found = [
            *self.problems,
            *(f"{k} is {v!r}, a key that this converter does not know" for k, v in unknown.items()),
        ]
        if found:
            raise CheckpointError("\n".join([f"this {family} model cannot be converted:", *found]))
