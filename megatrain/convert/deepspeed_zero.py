"""The float32 weights and moments of a DeepSpeed checkpoint under the names of the model that was trained.

Under stages 1 and 2 of ZeRO each parameter group is one flat vector, cut evenly over the ranks. Under stage 3 each
parameter is cut evenly over the ranks for itself, and a rank's parts lie one behind the other. A universal checkpoint
has a folder for each parameter, with a file for each of its tensors. Nothing of DeepSpeed is imported, and nothing in
its files is executed (see `pickled`).
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.base.errors import CheckpointError
from megatrain.convert.folder import WEIGHTS, Folder
from megatrain.convert.pickled import Placeholder, load_pickled

MOMENTS = ("exp_avg", "exp_avg_sq")

_RANK = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)")
"""Data-parallel rank, which stage 0 has none of, and tensor-parallel rank."""


@dataclass(frozen=True)
class Partitioned:
    """A parameter's shape and where its elements lie: in order, (rank's flat vector, first, count)."""

    shape: tuple[int, ...]
    parts: tuple[tuple[Tensor, int, int], ...]

    def whole(self) -> Tensor:
        numel = math.prod(self.shape)
        return torch.cat([flat.narrow(0, first, count) for flat, first, count in self.parts])[:numel].view(self.shape)


class DeepSpeedFolder(Folder):
    """A checkpoint of DeepSpeed, read like the Hugging Face folder `like`, whose config and tokenizer it takes.

    Args:
        path: a folder global_step..., or the one that holds it.

    Raises:
        CheckpointError: a file is missing or damaged, or the model was cut over tensor-parallel ranks.
    """

    def __init__(self, path: str | Path, like: str | Path):
        super().__init__(like, weights=False)
        self.path = Path(path)
        self.step_folder = newest_step(self.path)
        self._held = self._read_all()

    @property
    def names(self) -> list[str]:
        return sorted(name for state, name in self._held if state == WEIGHTS)

    @property
    def moments(self) -> tuple[str, ...]:
        return tuple(s for s in MOMENTS if all((s, name) in self._held for name in self.names))

    def __contains__(self, name: object) -> bool:
        return (WEIGHTS, name) in self._held

    def read(self, name: str, state: str = WEIGHTS) -> Tensor:
        held = self._held[state, name]
        return held.whole() if isinstance(held, Partitioned) else held

    def rename(self, prefix: str, untied: str) -> None:
        """Their model's names are whole."""

    def transformers_model(self, transformers: Any) -> Any:
        config = transformers.AutoConfig.from_pretrained(self.home, local_files_only=True)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict({name: self.read(name) for name in self.names}, strict=False)
        return model

    def _read_all(self) -> "Held":
        models = [load_pickled(path) for path in _by_rank(self.step_folder, "*_model_states.pt")]
        optimisers = [load_pickled(path) for path in _by_rank(self.step_folder, "*_optim_states.pt")]
        first = models[0]
        try:
            shards = [dict(optimiser["optimizer_state_dict"]) for optimiser in optimisers]
            if len({"zero_stage" in shard for shard in shards}) > 1:
                raise KeyError("zero_stage")
            if not shards or "zero_stage" not in shards[0]:
                held: Held = {(WEIGHTS, name): x for name, x in first["module"].items()}
            else:
                held = dict(self._frozen(models, _number(shards[0]["zero_stage"])))
                for state in (WEIGHTS, *MOMENTS) if _has_moments(shards[0]) else (WEIGHTS,):
                    held |= {(state, name): x for name, x in self._trained(first, shards, state)}
            return with_shared(held, first)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise CheckpointError(f"{self.step_folder} is not laid out as DeepSpeed does it: {error!r}") from None

    def _trained(
        self, model: dict[str, Any], shards: list[dict[str, Any]], state: str
    ) -> Iterator[tuple[str, Partitioned]]:
        counts = shards[0]["partition_count"]
        world = max(counts) if isinstance(counts, list) else int(counts)
        if world != len(shards):
            raise CheckpointError(
                f"{self.step_folder} has {len(shards)} of {world} *_optim_states.pt: the others are missing"
            )
        if _number(shards[0]["zero_stage"]) == 3:
            shapes = {name: shape for group in model["param_shapes"] for name, shape in group.items()}
            flats = [_joined(_groups(shard, state)) for shard in shards]
            yield from _cut_each(shapes, flats)
            return
        paddings = shards[0].get("param_alignment_paddings")
        for n, shapes in enumerate(model["param_shapes"]):
            flats = [_groups(shard, state)[n] for shard in shards]
            yield from _cut_together(shapes, flats, paddings[n] if paddings else [0] * len(shapes))

    def _frozen(self, models: list[dict[str, Any]], stage: int) -> Iterator[tuple[tuple[str, str], Partitioned]]:
        shapes = models[0].get("frozen_param_shapes") or {}
        for name, shape in shapes.items():
            held = [model["frozen_param_fragments"][name] for model in (models if stage == 3 else models[:1])]
            parts = tuple((fragment.view(-1), 0, fragment.numel()) for fragment in held)
            yield (WEIGHTS, name), Partitioned(tuple(shape), parts)


class UniversalFolder(DeepSpeedFolder):
    """A universal checkpoint of DeepSpeed: STEP/zero/PARAMETER/fp32.pt, exp_avg.pt, exp_avg_sq.pt."""

    def _read_all(self) -> "Held":
        (model, *_) = [load_pickled(path) for path in _by_rank(self.step_folder, "*_model_states.pt")]
        held: Held = {}
        try:
            for shape_of in (dict(model.get("module") or {}), dict(model.get("frozen_param_fragments") or {})):
                held |= {(WEIGHTS, name): x for name, x in shape_of.items() if isinstance(x, Tensor) and x.numel()}
            for folder in sorted((self.step_folder / "zero").iterdir()):
                for state in (WEIGHTS, *MOMENTS) if folder.is_dir() else ():
                    path = folder / ("fp32.pt" if state == WEIGHTS else f"{state}.pt")
                    if path.exists():
                        held[state, folder.name] = _of_its_shape(load_pickled(path), model, folder.name)
            return with_shared(held, model)
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{self.step_folder} is not laid out as DeepSpeed does it: {error!r}") from None


Held = dict[tuple[str, str], "Partitioned | Tensor"]
"""By (state, name)."""


def deepspeed_folder(path: str | Path, like: str | Path) -> DeepSpeedFolder:
    """The checkpoint at `path`, universal or not."""
    universal = (newest_step(Path(path)) / "zero").is_dir()
    return (UniversalFolder if universal else DeepSpeedFolder)(path, like)


def with_shared(held: Held, model: dict[str, Any]) -> Held:
    """Names without what DeepSpeed puts before them; tied parameters under all of their names."""
    for alias, name in dict(model.get("shared_params") or {}).items():
        held |= {(state, alias): x for (state, of), x in list(held.items()) if of == name}
    for (state, name), x in held.items():
        if not isinstance(x, Tensor | Partitioned):
            raise TypeError(f"the {state} of {name} is a {type(x).__name__} and no tensor")
    bare = {(state, name.removeprefix("module.")): x for (state, name), x in held.items()}
    return bare if all(name.startswith("module.") for _, name in held) else held


def _of_its_shape(saved: Any, model: dict[str, Any], name: str) -> Tensor:
    """Stages 1 and 2 become a mapping with the whole parameter, stage 3 its elements alone."""
    if isinstance(saved, dict):
        if saved.get("vocab_tensor") or saved.get("param_n_sub_params") or saved.get("sub_param_shape"):
            raise CheckpointError(f"{name} was cut by tensor parallelism in parts: convert a model that was not")
        return saved["param"]
    shapes = {of: shape for group in model["param_shapes"] or () for of, shape in group.items()}
    return saved.view(tuple(shapes[name]))


def _has_moments(shard: dict[str, Any]) -> bool:
    try:
        return all(_groups(shard, state) for state in MOMENTS)
    except (KeyError, TypeError, IndexError):
        return False


def _groups(shard: dict[str, Any], state: str) -> list[Tensor]:
    """A rank's flat vectors, one for each group."""
    stage_3 = _number(shard["zero_stage"]) == 3
    if state == WEIGHTS:
        return list(shard["fp32_flat_groups" if stage_3 else "single_partition_of_fp32_groups"])
    found = shard["optimizer_state_dict" if stage_3 else "base_optimizer_state"]
    groups = found["state"] if isinstance(found, dict) else found
    return [groups[n][state] for n in range(len(groups))]


def _number(value: Any) -> int:
    """A whole number; theirs may be a member of an enumeration."""
    return int(value.args[0]) if isinstance(value, Placeholder) else int(value)


def newest_step(path: Path) -> Path:
    """The folder of a step: the path itself, or the highest global_step... in it (its `latest` is not trusted).

    Raises:
        CheckpointError: there is none.
    """
    if list(path.glob("*_model_states.pt")):
        return path
    steps = {int(m[1]): p for p in path.glob("global_step*") if (m := re.fullmatch(r"global_step(\d+)", p.name))}
    if not steps:
        raise CheckpointError(f"{path} holds no DeepSpeed checkpoint: give its folder global_step...")
    return steps[max(steps)]


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    found = {}
    for path in folder.glob(pattern):
        match = _RANK.search(path.name)
        if match is None:
            raise CheckpointError(f"{path} names no rank: DeepSpeed's files say mp_rank_00")
        if int(match[2]):
            raise CheckpointError(f"{path} is of a model cut over tensor-parallel ranks: convert one that is not")
        found[int(match[1] or 0)] = path
    if not found and "model" in pattern:
        raise CheckpointError(f"{folder} has no {pattern}: it is not whole")
    return [found[rank] for rank in sorted(found)]


def _joined(flats: Any) -> Tensor:
    return torch.cat([flat.view(-1) for flat in flats]) if isinstance(flats, list | tuple) else flats


def _cut_together(shapes: Any, flats: list[Tensor], paddings: list[int]) -> Iterator[tuple[str, Partitioned]]:
    """Stages 1 and 2: parameters lie one behind the other in the vector that the ranks' parts make."""
    at = 0
    bounds = [0]
    for flat in flats:
        bounds.append(bounds[-1] + flat.numel())
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        end = at + math.prod(shape)
        parts = [
            (flat, max(at, low) - low, min(end, high) - max(at, low))
            for flat, low, high in zip(flats, bounds, bounds[1:], strict=False)
            if max(at, low) < min(end, high)
        ]
        if sum(count for _, _, count in parts) != end - at:
            raise CheckpointError(f"{name} lies beyond the end of its group: the files are not of one checkpoint")
        yield name, Partitioned(tuple(shape), tuple(parts))
        at = end + int(padding)


def _cut_each(shapes: Any, flats: list[Tensor]) -> Iterator[tuple[str, Partitioned]]:
    """Stage 3: each parameter is cut evenly, the last part filled up; a rank's parts lie one behind the other."""
    at = 0
    for name, shape in shapes.items():
        each = -(-math.prod(shape) // len(flats))
        if any(at + each > flat.numel() for flat in flats):
            raise CheckpointError(f"{name} lies beyond the end of its rank's part: the files are not of one checkpoint")
        yield name, Partitioned(tuple(shape), tuple((flat, at, each) for flat in flats))
        at += each
