"""Starting anew, going on, or refusing: what a run does about what its folder already holds."""

from pathlib import Path
from typing import Any

from megatrain.base.errors import CheckpointError, ConfigError
from megatrain.base.log import log, warn
from megatrain.checkpoint.checkpoints import Checkpoints
from megatrain.checkpoint.keys import acknowledged, changed_keys
from megatrain.checkpoint.read import Commit
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
    commits = Checkpoints(run.commits).commits()
    if not commits or commits[-1].step < run.total_steps:
        return False
    refuse_other_run(run, commits[-1].manifest.facts.get("config", {}))
    where = redacted(run.commits)
    log("%s has finished: step %d of %d is in %s", run.name, commits[-1].step, run.total_steps, where)
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
        return None
    if run.checkpoint.resume == "never":
        raise ConfigError(
            f"checkpoint.resume is never and {redacted(run.commits)} holds step {commit.step}: choose another name, "
            "or set checkpoint.resume=auto"
        )
    refuse_other_run(run, commit.manifest.facts.get("config", {}))
    return commit


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


def refuse_other_tokenizer(commit: Commit, fingerprint: str, acknowledge: tuple[str, ...]) -> None:
    """Raise unless the weights of `commit` were trained on ids of the tokenizer that the data was made with.

    Raises:
        ConfigError: they were not, and `tokenizer` is not acknowledged.
    """
    known = commit.manifest.facts.get("tokenizer")
    theirs = known.get("fingerprint") if isinstance(known, dict) else known
    if theirs is not None and theirs != fingerprint and not acknowledged("tokenizer", acknowledge):
        raise ConfigError(
            f"{commit.storage.describe(commit.folder)} was trained with another tokenizer (sha256 {theirs[:12]}, the "
            f"data's is {fingerprint[:12]}), so the same ids mean other text: build the data with its "
            "tokenizer.json, or add tokenizer to checkpoint.acknowledge"
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
