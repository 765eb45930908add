"""What a family's table says: which of our tensors is made of which of theirs, and what each key of a config means."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from string import Formatter
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

NO_EFFECT_IF_EMPTY = frozenset({
    "add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "cross_attention_hidden_size", "do_sample",
    "early_stopping", "finetuning_task", "is_encoder_decoder", "is_llama_config", "output_attentions",
    "output_hidden_states", "output_scores", "prefix", "pruned_heads", "remove_invalid_values",
    "return_dict_in_generate", "rope_interleaved", "sep_token_id", "suppress_tokens", "tf_legacy_loss",
    "tie_encoder_decoder", "torchscript", "use_bfloat16",
})  # fmt: skip
"""Keys that old files write out with their defaults: False, 0 and nothing are those."""

WRITTEN_ANEW = frozenset({
    "_name_or_path", "architectures", "auto_map", "dtype", "model_type", "n_ctx", "torch_dtype", "transformers_version",
})  # fmt: skip
"""Those of them that are said anew of each model that is written; the way back gives the others again."""


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
    share = {"partial_rotary_factor": position.share} if position.share != 1 else {}
    return {
        "rope_parameters": {"rope_type": kind, "rope_theta": position.theta, **share, **scaling},
        "rope_theta": position.theta,
        "rope_scaling": {"rope_type": kind, **scaling} if scaling else None,
    }


@dataclass(frozen=True)
class Row:
    """One of our tensors and theirs. `{i}` stands for a layer's number, and so does any other name for another stack.

    Several of theirs are joined along dimension 0; `widths` names their sizes there ("q", "kv", "ff"). A number that
    stands in theirs only, `{e}`, counts experts: ours has those along a dimension of its own, the first.
    """

    ours: str
    theirs: tuple[str, ...]
    widths: tuple[str, ...] = ()
    transposed: bool = False
    """Theirs is [in, out]."""
    grouped: bool = False
    """Theirs is [group of heads, its queries and then one key and one value, head_dim, ...]; ours has all queries
    first, then all keys, then all values. With as many keys as queries a group is a head."""
    n_stacked: int = 0
    """Theirs are those of so many experts, one expert after the other; 0: there are none."""
    n_tokens: int | None = None
    """Rows that are tokens, where ours has more: theirs has no others, since it would count them in its softmax."""

    @classmethod
    def of(cls, ours: str, *theirs: str, **options: Any) -> "Row":
        return cls(ours, theirs, **options)

    @property
    def counter(self) -> str | None:
        """The name of the number that tells our tensors of this row apart: the stack it belongs to."""
        return next(iter(_numbers(self.ours)), None)

    def at(self, number: int | None, counts: Mapping[str, int]) -> "Row":
        """This row in layer `number` of its stack, experts numbered."""
        known: dict[str, Any] = {} if self.counter is None else {self.counter: number}
        theirs, n_stacked = [name.format_map(_Kept(known)) for name in self.theirs], 0
        if inner := next(iter(_numbers(theirs[0])), None):
            n_stacked = counts[inner]
            theirs = [name.format(**{inner: expert}) for expert in range(n_stacked) for name in theirs]
        ours = self.ours.format(**known)
        return replace(self, ours=ours, theirs=tuple(theirs), n_stacked=n_stacked)

    def join(self, tensors: Sequence[Tensor], sizes: Mapping[str, int]) -> Tensor:
        """Ours from theirs.

        Raises:
            CheckpointError: one of theirs has another width than the config says.
        """
        if not self.n_stacked:
            return self._joined(tensors, self.theirs, sizes).contiguous()
        each = len(tensors) // self.n_stacked
        starts = range(0, len(tensors), each)
        return torch.stack([self._joined(tensors[a : a + each], self.theirs[a : a + each], sizes) for a in starts])

    def split(self, whole: Tensor, sizes: Mapping[str, int]) -> list[Tensor]:
        """Theirs from ours: the way back of `join`."""
        experts = whole if self.n_stacked else [whole[: self.n_tokens]]
        return [part.contiguous() for expert in experts for part in self._split(expert, sizes)]

    def _joined(self, tensors: Sequence[Tensor], names: Sequence[str], sizes: Mapping[str, int]) -> Tensor:
        tensors = [x.T if self.transposed and x.dim() == 2 else x for x in tensors]
        for name, size, x in zip(names, self.widths, tensors, strict=bool(self.widths)):
            if x.shape[0] != sizes[size]:
                raise CheckpointError(f"{name} has {x.shape[0]} rows and its config says {sizes[size]}")
        whole = torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]
        if not self.grouped:
            return whole
        n_groups, each, width = _groups(sizes)
        if whole.shape[0] != n_groups * (each + 2) * width:
            wanted = n_groups * (each + 2) * width
            raise CheckpointError(f"{names[0]} has {whole.shape[0]} rows and its config says {wanted}")
        parts = whole.unflatten(0, (n_groups, each + 2, width)).split([each, 1, 1], 1)
        return torch.cat([part.flatten(0, 2) for part in parts])

    def _split(self, whole: Tensor, sizes: Mapping[str, int]) -> list[Tensor]:
        if self.grouped:
            n_groups, each, width = _groups(sizes)
            parts = whole.split([sizes["q"], sizes["kv"], sizes["kv"]])
            heads = [p.unflatten(0, (n_groups, n, width)) for p, n in zip(parts, (each, 1, 1), strict=True)]
            whole = torch.cat(heads, 1).flatten(0, 2)
        found = whole.split([sizes[width] for width in self.widths]) if self.widths else (whole,)
        return [x.T if self.transposed and x.dim() == 2 else x for x in found]


def _groups(sizes: Mapping[str, int]) -> tuple[int, int, int]:
    """Groups of heads, queries in each, and the width of a head."""
    return sizes["kv"] // sizes["head_dim"], sizes["q"] // sizes["kv"], sizes["head_dim"]


class _Kept(dict[str, Any]):
    """Leaves what it does not know as it stands."""

    def __missing__(self, key: str) -> str:
        return "{" + key + "}"


def _numbers(name: str) -> list[str]:
    return [field for _, field, _, _ in Formatter().parse(name) if field]


def expanded(rows: Sequence[Row], counts: Mapping[str, int]) -> Iterator[Row]:
    """All rows of a model: those outside of stacks, and those inside once for each layer of their stack.

    Args:
        counts: layers of each stack and experts of a layer, by the names that rows use for their numbers.
    """
    yield from (row.at(None, counts) for row in rows if row.counter is None)
    for stack in dict.fromkeys(row.counter for row in rows if row.counter is not None):
        for number in range(counts[stack]):
            yield from (row.at(number, counts) for row in rows if row.counter == stack)


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

    def rope(self, share: float = 1.0) -> dict[str, Any]:
        """Our rotary section, from either generation of their keys.

        Args:
            share: of each head that turns where they do not say it.
        """
        said, older = dict(self.get("rope_parameters", {})), dict(self.get("rope_scaling", {}))
        for section in (said, older):
            section.pop("rope_interleaved", None)
            kind = section.pop("type", None)
            if "rope_type" not in section and kind is not None:
                section["rope_type"] = kind
        for key in said.keys() & older.keys():
            if said[key] != older[key]:
                self.problems.append(
                    f"rope_parameters says {key}={said[key]!r} and rope_scaling {older[key]!r}: remove the one that "
                    "the model was not trained with"
                )
        said |= older
        kind = said.pop("rope_type", "default")
        theta = said.pop("rope_theta", self.get("rope_theta", self.get("rotary_emb_base", 10_000.0)))
        share = said.pop("partial_rotary_factor", self.get("rotary_pct", self.get("partial_rotary_factor", share)))
        if kind not in ROPE:
            self.problems.append(f"rotary positions are scaled by {kind!r}: ours know {', '.join(ROPE)}")
            return {"kind": "rotary"}
        ours, keys = ROPE[kind]
        section = {"kind": ours, "theta": float(theta)} | ({"share": share} if share != 1 else {})
        for key in {"factor", "original_max_position_embeddings"} & keys.keys():
            if said.get(key) is None:
                self.problems.append(f"rotary positions of kind {kind} need {key}, which is missing")
        section |= {keys[key]: value for key, value in said.items() if key in keys and value is not None}
        if unknown := {
            k: v for k, v in said.items() if k not in keys and v is not None and (k, v) != ("truncate", True)
        }:
            self.problems.append(f"rotary positions of kind {kind} have {unknown}, which ours have not")
        return section

    def kept(self) -> dict[str, Any]:
        """What the way back to this family writes again as it was: ids of special tokens, rates of dropout, ..."""
        return {key: value for key, value in self.values.items() if key in NO_EFFECT - WRITTEN_ANEW}

    def finish(self, family: str) -> None:
        """
        Raises:
            CheckpointError: with everything that our model cannot be.
        """
        known = self.read | NO_EFFECT
        unknown = {
            k: v
            for k, v in self.values.items()
            if v is not None and k not in known and (v or k not in NO_EFFECT_IF_EMPTY)
        }
        found = [
            *self.problems,
            *(f"{k} is {v!r}, a key that this converter does not know" for k, v in unknown.items()),
        ]
        if found:
            raise CheckpointError("\n".join([f"this {family} model cannot be converted:", *found]))
