"""Starting anew, going on, or refusing: what a run does about what its folder already holds."""

import os
from pathlib import Path
from typing import Any

from megatrain.base.errors import CheckpointError, ConfigError
from megatrain.base.log import log, warn
from megatrain.checkpoint.checkpoints import Checkpoints
from megatrain.checkpoint.keys import acknowledged, changed_keys
from megatrain.checkpoint.model import config_of, other_meanings
from megatrain.checkpoint.read import Commit, candidates
from megatrain.checkpoint.remote import open_storage
from megatrain.checkpoint.tokenizer import entry_of
from megatrain.config.build import build, flat, plain
from megatrain.config.source import from_plain
from megatrain.data.ledger import FILE, Head, Ledger
from megatrain.data.store import redacted
from megatrain.train.config import Run
from megatrain.train.folder import RunFolder


def finished(run: Run) -> bool:
    """Whether the run's folder holds its last step; says so."""
    if run.checkpoint.resume == "never":
        return False
    storage = open_storage(run.commits)
    step, folder = next(iter(candidates(storage)), (0, ""))
    if step < run.total_steps:
        return False
    try:
        commit = Commit.open(storage, folder)
    except CheckpointError:
        return False  # whoever resumes it is told
    _refuse_other_run_of(commit, run)
    where = redacted(storage.describe(folder))
    log("%s has finished: step %d of %d is in %s", run.name, step, run.total_steps, where)
    log("its bytes were not read now: megatrain checkpoint verify %s does", where)
    return True


def commit_to_resume(run: Run, checkpoints: Checkpoints) -> Commit | None:
    """The commit that this run goes on from, the same on every rank; None to start anew.

    Raises:
        ConfigError: the folder holds another run, or `checkpoint.resume` says otherwise.
        CheckpointError: the newest commit is damaged and no fallback is allowed.
    """
    folder = RunFolder(run.folder)
    commit = checkpoints.newest(fallback=run.checkpoint.fallback)
    if commit is None:
        if run.checkpoint.resume == "must":
            raise CheckpointError(
                f"checkpoint.resume is must and {redacted(run.commits)} holds no checkpoint: set it to auto to start "
                "anew"
            )
        former = folder.read_config()
        if former is not None:
            refuse_other_run(run, former)
        folder.refuse_foreign()
        if (step := folder.saved_step()) is not None:
            raise CheckpointError(
                f"{run.folder} has saved step {step}, and {redacted(run.commits)} holds no checkpoint: bring it back "
                "(is the disk mounted? is checkpoint.dir another?); to start anew, choose another name or remove "
                f"{run.folder}"
            )
        return None
    if run.checkpoint.resume == "never":
        raise ConfigError(
            f"checkpoint.resume is never and {redacted(run.commits)} holds step {commit.step}: choose another name, "
            "or set checkpoint.resume=auto"
        )
    _refuse_other_run_of(commit, run)
    return commit


def _refuse_other_run_of(commit: Commit, run: Run) -> None:
    refuse_other_run(run, commit.manifest.facts.get("config", {}))
    refuse_other_beginning(run, commit.manifest.facts.get("lineage") or [])


def refuse_other_run(run: Run, former: dict[str, Any]) -> None:
    """Raise unless `run` is the run whose configuration is `former`, up to keys that may change.

    Raises:
        ConfigError: naming every key that changes the mathematics and is not acknowledged.
    """
    _, refused = changed_keys(_filled(former), plain(run))
    refused = {key: pair for key, pair in refused.items() if not acknowledged(key, run.checkpoint.acknowledge)}
    if not refused:
        return
    raise ConfigError(
        [
            f"{run.folder} holds a run with {key}={_show(old)}, and it is {_show(new)} here: set it back, "
            f"choose another name, or add {key} to checkpoint.acknowledge, as in 'checkpoint.acknowledge=[{key}]'"
            for key, (old, new) in sorted(refused.items())
        ]
    )


def refuse_other_beginning(run: Run, lineage: list[dict[str, Any]]) -> None:
    """Raise unless a run that says where its weights begin has begun there.

    Raises:
        ConfigError: it began otherwise, and `checkpoint.init_from` is not acknowledged.
    """
    wanted = run.checkpoint.init_from
    if wanted is None or acknowledged("checkpoint.init_from", run.checkpoint.acknowledge):
        return
    began = next((line.get("init_from") for line in lineage if line.get("step") == 0), None)
    if began is None or _place(began) != _place(wanted):
        began_with = "weights of its own" if began is None else f"those of {began}"
        raise ConfigError(
            f"{run.folder} holds a run that began with {began_with}, and checkpoint.init_from is {wanted} here: choose "
            "another name to begin there, or leave init_from out to go on"
        )


def _place(path: str) -> str:
    return path.rstrip("/") if "://" in path else os.path.abspath(path)


def refuse_other_tokenizer(commit: Commit, fingerprint: str, acknowledge: tuple[str, ...]) -> None:
    """Raise unless the weights of `commit` were trained on ids of the tokenizer that the data was made with.

    Raises:
        ConfigError: they were not, and `tokenizer` is not acknowledged.
    """
    theirs = entry_of(commit.manifest.facts).get("fingerprint")
    if theirs is not None and theirs != fingerprint and not acknowledged("tokenizer", acknowledge):
        raise ConfigError(
            f"{commit.storage.describe(commit.folder)} was trained with another tokenizer (sha256 {theirs[:12]}, the "
            f"data's is {fingerprint[:12]}), so the same ids mean other text: build the data with its "
            "tokenizer.json, or add tokenizer to checkpoint.acknowledge"
        )


def refuse_other_model(commit: Commit, run: Run) -> None:
    """Raise unless the run's `model` section is that of the weights in `commit`, up to what only training needs.

    The same shapes can be read as other models: with other heads, positions, activations.

    Raises:
        ConfigError: naming every key that differs and is not acknowledged.
    """
    where = commit.storage.describe(commit.folder)
    different = {
        f"model.{key}": pair
        for key, pair in other_meanings(config_of(commit)["model"], plain(run.model)).items()
        if not acknowledged(f"model.{key}", run.checkpoint.acknowledge)
    }
    learned, rows = commit.manifest.tensors.get(("weights", "positions.weight")), run.data.seq_len
    if learned is not None and not different and learned.shape[0] != rows:
        raise ConfigError(
            f"{where} has learned {learned.shape[0]} positions, and data.seq_len is {rows}: set it to "
            f"{learned.shape[0]}"
        )
    if not different:
        return
    raise ConfigError(
        [f"{where} is no model of this run file (`megatrain checkpoint inspect {where} --model` writes its own):"]
        + [
            f"{key} is {_show(theirs)} there and {_show(mine)} here: set it so, or add {key} to checkpoint.acknowledge"
            for key, (theirs, mine) in different.items()
        ]
    )


def _filled(former: dict[str, Any]) -> dict[str, Any]:
    """A saved configuration with the defaults of keys that did not exist when it was written.

    A new key's default is what was done before there was one. What can no longer be read stays as it is.
    """
    try:
        return plain(build(Run, from_plain(former, "the saved run"))[0])
    except ConfigError:
        return former


def refuse_other_ledger(commit: Commit, folder: Path) -> None:
    """Raise unless the ledger in `folder` is the one that `commit` remembers, with lines added at most.

    One that is not there is begun anew, and that is said: a run may go on elsewhere.

    Raises:
        DataError: lines are missing, or are others.
    """
    known, ledger = Head.of(commit.manifest.facts.get("ledger")), Ledger(folder / FILE)
    if known is None:
        return
    if ledger.lines:
        ledger.refuse_other(known)
    else:
        warn("%s is not here: it begins anew, and says nothing of the steps before", ledger.path)


def _show(value: Any) -> str:
    return "nothing" if value is None else str(value)


def lineage(run: Run, commit: Commit | None) -> list[dict[str, Any]]:
    """Where this run's weights come from: a line for each start, with what was changed."""
    if commit is None:
        start: dict[str, Any] = {"step": 0}
        if run.checkpoint.init_from:
            start["init_from"] = run.checkpoint.init_from
        return [start]
    before = commit.manifest.facts.get("lineage", [])
    former, now = flat(_filled(commit.manifest.facts.get("config", {}))), flat(plain(run))
    changed = {
        k: [former.get(k), now.get(k)] for k in sorted(former.keys() | now.keys()) if former.get(k) != now.get(k)
    }
    return [*before, {"step": commit.step, "changed": changed}]
