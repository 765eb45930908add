"""Checkpoints of ours to DeepSpeed's formats, and back: for a model of the transformers library that it trains.

| out | is taken up |
|---|---|
| universal | by every stage of ZeRO on any number of ranks ("load_universal": true in its config) |
| ZeRO | by stages 1 and 2 on the number of ranks that it was written for, all parameters in one group |

Both hold float32 weights, moments and the step; rates and other settings stay those of the program that loads them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.base.errors import CheckpointError
from megatrain.base.optional import optional
from megatrain.checkpoint.model import config_of, model_choice, other_meanings
from megatrain.checkpoint.read import Reader, find
from megatrain.checkpoint.storage import new_place
from megatrain.checkpoint.tokenizer import valid_tokens
from megatrain.convert.check import Proof, Report
from megatrain.convert.deepspeed_zero import MOMENTS, deepspeed_folder
from megatrain.convert.families import FAMILY
from megatrain.convert.folder import CONFIG, WEIGHTS, read_bounded_json
from megatrain.convert.hugging_face import convert_in, understood, write_side_files
from megatrain.convert.mapping import family_for, rows_of, sizes_of
from megatrain.convert.pickled import write_pickled
from megatrain.convert.publish import made_beside, published
from megatrain.convert.table import Row

VERSION = "0.16.0"
"""Of DeepSpeed, by which it decides how to read: the formats are those of this and later ones."""

ALIGNMENT = 2
"""A flat group is filled up to a multiple of this for each rank."""

MOST_GROUPS = 64
"""Parameter groups of a program that a universal checkpoint serves."""


def from_deepspeed(folder: str | Path, like: str | Path, out: str | Path, *, check: bool = True) -> Report:
    """Make a checkpoint of the float32 weights and moments in a DeepSpeed checkpoint of a Hugging Face model.

    Args:
        folder: ZeRO of any stage, or universal.
        like: a folder with the model's config.json, and its tokenizer.

    Raises:
        CheckpointError: as `from_hugging_face`; or a file asks for code to be called, which is never done; or the
            checkpoint has a config.json of another model than `like`.
    """
    theirs = deepspeed_folder(folder, like)
    for place in (theirs.step_folder, theirs.step_folder.parent):
        if (place / CONFIG).is_file():
            _refuse_other_config(place / CONFIG, theirs.home / CONFIG, theirs.config)
    return convert_in(theirs, Path(out), check)


def _refuse_other_config(beside: Path, like: Path, config: dict[str, Any]) -> None:
    """What was trained says what it is: the same tensors under another config would be proven as that model."""
    own = understood(read_bounded_json(beside), beside)
    if different := other_meanings(own.section, understood(config, like).section):
        told = ", ".join(f"{key} {theirs} and {given}" for key, (theirs, given) in different.items())
        raise CheckpointError(
            f"{beside} and {like} are of different models ({told}): give --like the config.json of the training"
        )


def to_deepspeed(
    place: str | Path, out: str | Path, *, ranks: int | None = None, family: str | None = None, check: bool = True
) -> Report:
    """Write a checkpoint as DeepSpeed has it for the same model in transformers, whose config.json lies beside.

    Universal: one tensor is in memory at a time. For ZeRO: one kind of tensor of the whole model.

    Args:
        ranks: data-parallel ranks of ZeRO stages 1 and 2; by default the universal format is written.

    Raises:
        CheckpointError: the model is of no family, it has no moments, or what was written reads back otherwise.
    """
    out, commit = new_place(out), find(place)
    config, where = config_of(commit), commit.storage.describe(commit.folder)
    choice = model_choice(config["model"], where)
    kind = family_for(choice, commit, family)
    table, reader = FAMILY[kind](), commit.reader()
    if missing := [s for s in MOMENTS if reader.names(s) != reader.names(WEIGHTS)]:
        raise CheckpointError(
            f"{where} does not hold {' and '.join(missing)} of every weight: give a checkpoint of a training with "
            "AdamW, or write its weights alone with to-hf"
        )
    state = reader.state if isinstance(reader.state, dict) else {}
    rows = rows_of(table, choice, valid_tokens(commit))
    embedding = next(row.theirs[0] for row in rows if row.ours == "embedding.weight")
    shared = {table.untied: embedding} if choice.tie_embeddings else {}
    tensors = Theirs(reader, rows, sizes_of(choice), shared, _steps(state) or commit.step)
    with made_beside(out) as place:
        (place / tensors.tag).mkdir(parents=True)
        write_side_files(place, commit, table, choice, config["data"]["seq_len"], None)
        write_universal(place, tensors) if ranks is None else write_zero(place, tensors, ranks)
        return published(place, out, check, Proof(commit, deepspeed_folder(place, place), kind, where, str(out)))


def _steps(state: dict[str, Any]) -> int | None:
    return (state.get("engine") or {}).get("optimizer_steps")


class Theirs:
    """The tensors of a checkpoint under a family's names, as float32."""

    def __init__(self, reader: Reader, rows: list[Row], sizes: dict[str, int], shared: dict[str, str], steps: int):
        self.reader, self.rows, self.sizes, self.shared, self.steps = reader, rows, sizes, shared, steps
        self.tag = f"global_step{steps}"

    def of(self, state: str) -> Iterator[tuple[str, Tensor]]:
        for row in self.rows:
            parts = row.split(self.reader.read_full(row.ours, state), self.sizes)
            yield from zip(row.theirs, (part.float() for part in parts), strict=True)

    def shapes(self) -> dict[str, torch.Size]:
        """Of all tensors, without reading them."""
        found: dict[str, torch.Size] = {}
        for row in self.rows:
            parts = row.split(torch.empty(self.reader.stored(row.ours).shape, device="meta"), self.sizes)
            found |= dict(zip(row.theirs, (part.shape for part in parts), strict=True))
        return found

    def model_states(self, ranks: int, module: dict[str, Tensor], order: list[str] | None = None) -> dict[str, Any]:
        """What DeepSpeed keeps beside the optimiser's shards.

        Args:
            order: of the parameters in the flat group, where it matters.
        """
        shapes = self.shapes()
        return {
            "module": module,
            "buffer_names": [],
            "optimizer": None,
            "param_shapes": [{name: shapes[name] for name in order or shapes}],
            "frozen_param_shapes": None,
            "frozen_param_fragments": None,
            "shared_params": self.shared,
            "lr_scheduler": None,
            "data_sampler": None,
            "random_ltd": None,
            "skipped_steps": 0,
            "global_steps": self.steps,
            "global_samples": 0,
            "dp_world_size": ranks,
            "mp_world_size": 1,
            "num_experts": [],
            "ds_config": {},
            "ds_version": VERSION,
        }

    @property
    def step_count(self) -> Tensor:
        return torch.tensor(float(self.steps))


# ------------------------------------------------------------------------------------------------ universal


def write_universal(folder: Path, tensors: Theirs) -> None:
    """STEP/zero/PARAMETER/fp32.pt, exp_avg.pt, exp_avg_sq.pt, step.pt, and what is global beside."""
    step_folder = folder / tensors.tag
    for state in (WEIGHTS, *MOMENTS):
        for name, x in tensors.of(state):
            place = step_folder / "zero" / name
            place.mkdir(parents=True, exist_ok=True)
            write_pickled(
                place / ("fp32.pt" if state == WEIGHTS else f"{state}.pt"), {"param": x.clone(), "cat_dim": 0}
            )
            if state == WEIGHTS:
                write_pickled(place / "step.pt", tensors.step_count)
    common = {"loss_scaler": None, "dynamic_loss_scale": False, "overflow": False, "ds_version": VERSION}
    groups: list[dict[str, Any]] = [{} for _ in range(MOST_GROUPS)]  # empty: settings are the loading program's
    inner = {"state": {0: {"step": tensors.step_count}}, "param_groups": groups}  # where stage 3 looks
    whole = common | {"param_groups": groups, "optimizer_state_dict": inner}
    write_pickled(step_folder / "zero" / "optimizer_state.pt", whole)
    states = tensors.model_states(1, {})
    for name in ("mp_rank_00", "zero_pp_rank_0_mp_rank_00"):  # as stages 1 and 2, and as stage 3 call it
        write_pickled(step_folder / f"{name}_model_states.pt", states)
    (folder / "latest_universal").write_text(tensors.tag)


# ------------------------------------------------------------------------------------------------ ZeRO 1 and 2


def write_zero(folder: Path, tensors: Theirs, ranks: int) -> None:
    """A file of flat parts for each rank, and one with the whole model."""
    if ranks < 1:
        raise CheckpointError(f"{ranks} ranks: ZeRO is written for at least 1")
    step_folder = folder / tensors.tag
    order = parameter_order(folder)
    if set(order) != set(tensors.shapes()):
        raise CheckpointError(f"transformers has other parameters than the table: {set(order) ^ set(tensors.shapes())}")
    parts: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    padding = 0
    for state in (WEIGHTS, *MOMENTS):
        held = dict(tensors.of(state))
        flat = torch.cat([held.pop(name).reshape(-1) for name in order])
        each = -(-flat.numel() // (ALIGNMENT * ranks)) * ALIGNMENT
        padding = each * ranks - flat.numel()
        for rank in range(ranks):
            parts[rank][state] = flat[rank * each : (rank + 1) * each].clone()
    for rank, part in enumerate(parts):
        paddings = [padding if rank == ranks - 1 else 0]
        group = {s: part[s] for s in MOMENTS} | {"step": tensors.step_count}
        shard = {
            "loss_scaler": None,
            "dynamic_loss_scale": False,
            "overflow": False,
            "clip_grad": 0.0,
            "base_optimizer_state": [group],
            "base_optimizer_state_step": tensors.steps,
            "single_partition_of_fp32_groups": [part[WEIGHTS]],
            "zero_stage": 2,
            "group_paddings": paddings,
            "partition_count": [ranks],
            "ds_version": VERSION,
        }
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        write_pickled(step_folder / name, {"optimizer_state_dict": shard, "ds_config": {}, "ds_version": VERSION})
    module = {name: x.clone() for name, x in tensors.of(WEIGHTS)}
    module |= {name: module[of] for name, of in tensors.shared.items()}
    write_pickled(step_folder / "mp_rank_00_model_states.pt", tensors.model_states(ranks, module, order))
    (folder / "latest").write_text(tensors.tag)


def parameter_order(folder: Path) -> list[str]:
    """Names of the parameters of the model whose config.json lies in `folder`, as an optimiser is given them."""
    transformers = optional("transformers")
    if not transformers:
        raise CheckpointError(
            f"ZeRO lays parameters out in the model's own order, and transformers is not usable here "
            f"({transformers.why_not}): install it, or write the universal format"
        )
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        return [name for name, _ in transformers.AutoModelForCausalLM.from_config(config).named_parameters()]
