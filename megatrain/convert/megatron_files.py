"""Megatron-LM's two kinds of checkpoint as full tensors under Megatron-Core's names: a file for each model-parallel
rank (mp_rank_XX/model_optim_rng.pt), and torch_dist."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatrain.base.errors import CheckpointError
from megatrain.convert.pickled import attributes, load_pickled
from megatrain.convert.torch_dist import METADATA, DistFolder

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
RANK_FILE = "model_optim_rng.pt"

_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?")
_LAYER = re.compile(r"(decoder\.layers\.)(\d+)(\..*)")

ALIASES = (
    (r"^language_model\.", ""),
    (r"^embedding\.position_embeddings\.", "embedding.position_embeddings."),
    (r"^(encoder|transformer)\.", "decoder."),
    (r"\.(self_attention|attention)\.query_key_value\.", ".self_attention.linear_qkv."),
    (r"\.(self_attention|attention)\.dense\.", ".self_attention.linear_proj."),
    (r"\.mlp\.dense_h_to_4h\.", ".mlp.linear_fc1."),
    (r"\.mlp\.dense_4h_to_h\.", ".mlp.linear_fc2."),
    (r"\.(input_layernorm|input_norm)\.", ".self_attention.linear_qkv.layer_norm_"),
    (r"\.(pre_mlp_layernorm|post_attention_layernorm|post_attention_norm)\.", ".mlp.linear_fc1.layer_norm_"),
    (r"^decoder\.final_norm\.", "decoder.final_layernorm."),
)
"""Older names, and those of layers that are not fused: ours is the name in the newest checkpoints."""

CUT_IN = (".linear_proj.weight", ".linear_fc2.weight")
"""Ends of names of weights whose inputs tensor parallelism cuts, along dimension 1."""

CUT_OUT = (".linear_qkv.weight", ".linear_qkv.bias", "word_embeddings.weight", "output_layer.weight")
"""Those whose outputs it cuts, along dimension 0."""

GATED = (".linear_fc1.weight", ".linear_fc1.bias")
"""Cut along dimension 0 as well; with a gate each rank holds its part of the gate, then its part of the rest."""


class MegatronFiles(Protocol):
    """What both kinds offer."""

    path: Path
    arguments: dict[str, Any]
    """The command line of the training, by name."""

    @property
    def names(self) -> list[str]: ...

    def read(self, name: str) -> Tensor: ...

    def ranks(self) -> list[Mapping[str, Tensor]]:
        """What each tensor-parallel rank computes with, layers of all stages together."""
        ...


def newest_iteration(path: Path) -> Path:
    """The folder of an iteration: the path itself, or the highest iter_... in it (the hint beside is not trusted)."""
    if (path / METADATA).is_file() or any(path.glob(f"mp_rank_*/{RANK_FILE}")):
        return path
    found = {int(p.name[5:]): p for p in path.glob("iter_*") if p.name[5:].isdigit()}
    if not found:
        raise CheckpointError(f"{path} holds no checkpoint of Megatron-LM: give a folder with iter_... or mp_rank_...")
    return found[max(found)]


def open_megatron(path: str | Path) -> MegatronFiles:
    """
    Raises:
        CheckpointError: there is no such checkpoint, or a file is missing, damaged or asks for code to be called.
    """
    folder = newest_iteration(Path(path))
    return DistFiles(folder) if (folder / METADATA).is_file() else RankFiles(folder)


# ------------------------------------------------------------------------------------------------ a file for each rank


class RankFiles:
    """mp_rank_TT/model_optim_rng.pt, or mp_rank_TT_PPP/ where there are pipeline stages."""

    def __init__(self, path: Path):
        self.path = path
        found = {}
        for file in path.glob(f"mp_rank_*/{RANK_FILE}"):
            match = _RANK.fullmatch(file.parent.name)
            if match:
                found[int(match[1]), int(match[2] or 0)] = file
        n_tensor = 1 + max(t for t, _ in found)
        n_stages = 1 + max(p for _, p in found)
        if missing := [(t, p) for t in range(n_tensor) for p in range(n_stages) if (t, p) not in found]:
            raise CheckpointError(f"{path} lacks the file of tensor-parallel rank and stage {missing[0]}")
        files = {place: load_pickled(file) for place, file in sorted(found.items())}
        try:
            self.arguments = attributes(files[0, 0]["args"])
            self._ranks = [
                _all_stages([files[t, p] for p in range(n_stages)], path / f"rank {t}") for t in range(n_tensor)
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is not laid out as Megatron-LM does it: {error!r}") from None
        self.gated = bool(self.arguments.get("swiglu"))
        if not self.arguments.get("untie_embeddings_and_output_weights"):
            for rank in self._ranks:
                copy = rank.pop(HEAD, None)  # of a tied embedding, on the last stage
                if copy is not None and not torch.equal(copy, rank[EMBEDDING]):
                    raise CheckpointError(f"{HEAD} of {path} differs from {EMBEDDING}, and they are said to be tied")

    @property
    def names(self) -> list[str]:
        return sorted(self._ranks[0])

    def ranks(self) -> list[Mapping[str, Tensor]]:
        return list(self._ranks)

    def read(self, name: str) -> Tensor:
        parts = [rank[name] for rank in self._ranks]
        if len(parts) == 1:
            return parts[0]
        if name.endswith(GATED):
            if not self.gated:
                return torch.cat(parts)
            gates, ups = zip(*(part.chunk(2) for part in parts), strict=True)
            return torch.cat([*gates, *ups])
        if name.endswith(CUT_OUT):
            return torch.cat(parts)
        if name.endswith(CUT_IN):
            return torch.cat(parts, 1)
        if not all(torch.equal(part, parts[0]) for part in parts[1:]):
            raise CheckpointError(f"{name} differs between ranks of {self.path}, which should hold copies of it")
        return parts[0]


def _all_stages(files: list[dict[str, Any]], where: Path) -> dict[str, Tensor]:
    """One tensor-parallel rank's tensors, layers numbered through. Stage s of n holds chunks s, s + n, s + 2n, ..."""
    n_chunks = sum(1 for key in files[0] if re.fullmatch(r"model\d+", key)) or 1
    keys = ["model"] if n_chunks == 1 else [f"model{c}" for c in range(n_chunks)]
    found: dict[str, Tensor] = {}
    first = 0
    for key in keys:
        for file in files:
            named = {_known(name): x for name, x in _flat(file[key]) if isinstance(x, Tensor)}
            numbers = {int(m[2]) for name in named if (m := _LAYER.fullmatch(name))}
            for name, x in named.items():
                if match := _LAYER.fullmatch(name):
                    name = f"{match[1]}{int(match[2]) + first}{match[3]}"
                elif "word_embeddings_for_head" in name:
                    continue  # the last stage's copy of a tied embedding
                found[name] = x
            first += len(numbers)
    return found


def _flat(held: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, x in held.items():
        if isinstance(x, Mapping):
            yield from _flat(x, f"{prefix}{name}.")
        else:
            yield prefix + name, x


def _known(name: str) -> str:
    for pattern, known in ALIASES:
        name = re.sub(pattern, known, name)
    return name


# ------------------------------------------------------------------------------------------------ torch_dist


class DistFiles:
    """Full tensors; those of all layers may be stacked, decoder.layers.X for decoder.layers.N.X."""

    def __init__(self, path: Path):
        self.path = path
        self._dist = DistFolder(path)
        common = load_pickled(path / "common.pt")
        self.arguments = attributes(common.get("args")) if isinstance(common, dict) else {}
        self._places = dict(self._numbered())

    def _numbered(self) -> Iterator[tuple[str, tuple[str, int | None]]]:
        for name, held in self._dist.tensors.items():
            if name.startswith(("optimizer.", "rng_state", "chained_")) or name.endswith("_extra_state"):
                continue
            bare = name.removeprefix("model.")
            if bare.startswith("decoder.layers.") and not _LAYER.fullmatch(bare):
                rest = bare.removeprefix("decoder.layers.")
                for layer in range(held.shape[0]):
                    yield _known(f"decoder.layers.{layer}.{rest}"), (name, layer)
            else:
                yield _known(bare), (name, None)

    @property
    def names(self) -> list[str]:
        return sorted(self._places)

    def read(self, name: str) -> Tensor:
        return self._dist.read(*self._places[name])

    def ranks(self) -> list[Mapping[str, Tensor]]:
        return [{name: self.read(name) for name in self.names}]
