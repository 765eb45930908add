"""The checkpoints of a run: saved by all ranks together, committed at one instant, kept and taken up again.

A save begins when every rank copies its counted slices to host memory. Training may go on from there; `save.Save` does
the rest in a thread.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from megatrain.base.errors import CheckpointError, FailedCheckpointError
from megatrain.base.log import log, warn
from megatrain.checkpoint.compare import differences, some
from megatrain.checkpoint.config import Keep
from megatrain.checkpoint.exchange import Exchange, error_as_json, error_of
from megatrain.checkpoint.lease import Lease, run_identity
from megatrain.checkpoint.manifest import COMMIT
from megatrain.checkpoint.origin import origin
from megatrain.checkpoint.read import Commit, Reader, candidates, find, unmarked
from megatrain.checkpoint.remote import open_storage
from megatrain.checkpoint.retention import retire
from megatrain.checkpoint.save import Save
from megatrain.checkpoint.storage import Storage, refusal
from megatrain.checkpoint.write import Fault, HostCopy
from megatrain.parallel.mesh import ALONE, Axis
from megatrain.parallel.shard import Slice

FILE_BYTES = 4 * 2**30
WRITER_NICENESS = 10
PATIENCE_SECONDS = 60.0
"""Of waiting for a save without a word."""


class Holder(Protocol):
    """What holds the state: an engine."""

    def slices(self) -> Iterator[Slice]: ...

    def load(self, fill: Callable[[Slice], None], states: Callable[[str], bool] = ...) -> None: ...


class Checkpoints:
    """Saves and finds the commits of one run. Every method is called by all ranks at the same point of the run.

    Args:
        storage: the folder or the URL (s3://...) that holds the step-... folders; all ranks see the same one.
        world: all ranks of the run.
        file_bytes: about the largest file written.
        go_on: a save that fails is a warning, and counted in `failures`; otherwise the next `save` or `wait` raises it.
        committed: called on rank 0 with the step of each commit, in the thread that made it.
        fault: called with the name of every point that a save passes.
    """

    def __init__(
        self,
        storage: Storage | str | Path,
        world: Axis = ALONE,
        *,
        keep: Keep | None = None,
        file_bytes: int = FILE_BYTES,
        go_on: bool = False,
        committed: Callable[[int], None] = lambda step: None,
        fault: Fault = lambda point: None,
    ):
        self.storage = open_storage(storage) if isinstance(storage, str | Path) else storage
        self.keep, self.file_bytes, self.go_on = keep or Keep(), file_bytes, go_on
        self.run: str | None = None
        self.lease: Lease | None = None
        self.failures: list[str] = []
        self.committed: int | None = None
        """Step of the latest commit that this job made."""
        self._exchange = Exchange(world)
        self._told = committed
        self._fault = fault
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._failure: tuple[int, BaseException] | None = None

    @property
    def rank(self) -> int:
        return self._exchange.rank

    # -------------------------------------------------------------------------------------------- who may write

    def claim(self, run_folder: str | Path) -> None:
        """Take the run directory for this job.

        Raises:
            CheckpointError: on every rank, if another job holds it.
        """

        def take() -> str:
            self.lease = Lease.take(run_folder)
            return run_identity(run_folder, self._run_of_commits())

        self.run = self._exchange.on_rank_0(take)

    def _run_of_commits(self) -> str | None:
        for _, folder in candidates(self.storage):
            with contextlib.suppress(CheckpointError):
                return Commit.open(self.storage, folder).manifest.facts.get("run")
        return None

    def _check_lease(self) -> None:
        if self.lease is not None:
            self.lease.check()

    def close(self) -> None:
        """Wait for the save that runs, and give the run directory back.

        Raises:
            CheckpointError: that save failed.
        """
        try:
            self.wait()
        finally:
            if self.lease is not None:
                self.lease.release()
                self.lease = None
            self._exchange.close()

    # -------------------------------------------------------------------------------------------- saving

    def reserve(self, slices: Iterable[Slice]) -> None:
        """Take the host memory of saves now, rather than in the step of the first."""
        self._copy.reserve(slices)

    def save(
        self, step: int, slices: Iterable[Slice], state: Any, facts: dict[str, Any], *, asynchronous: bool = True
    ) -> None:
        """Save the counted `slices` as the commit of `step`. When this returns, their memory may change.

        A save that is still running is awaited first.

        Args:
            state: where the run stands, as JSON values; the same on every rank.
            facts: what the run is, as JSON values: config, tokenizer (its fingerprint), lineage, score (held-out loss).
            asynchronous: write in a thread, and let the caller train on.

        Raises:
            CheckpointError: the save before this one failed, or, if not asynchronous, this one.
        """
        self.wait()
        self._fault("before the copy")
        self._copy.take(slices)
        known = {"run": self.run, "origin": origin(self._exchange.size)}
        frozen_state, frozen_facts = json.loads(json.dumps(state)), json.loads(json.dumps(facts | known))
        self._thread = threading.Thread(
            target=self._guarded, args=(step, frozen_state, frozen_facts, asynchronous), name="checkpoint", daemon=True
        )
        self._thread.start()
        if not asynchronous:
            self.wait()

    def wait(self) -> None:
        """Return when no save is running.

        Raises:
            CheckpointError: the save failed (with `go_on`, that is only counted).
        """
        if self._thread is not None:
            began = time.monotonic()
            while self._thread.is_alive():
                self._thread.join(PATIENCE_SECONDS)
                if self._thread.is_alive():
                    waited = time.monotonic() - began
                    warn(
                        "a checkpoint is still being written after %.0f seconds of waiting: is the disk stuck?", waited
                    )
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is None:
            return
        step, error = failure
        if self.go_on and isinstance(error, CheckpointError):
            self.failures.append(str(error))
            warn("step %d was not saved (checkpoint.failed_save=go_on): %s", step, error)
            return
        raise error

    def _guarded(self, step: int, state: Any, facts: dict[str, Any], yielding: bool) -> None:
        if (
            yielding and sys.platform == "linux"
        ):  # where this is the thread alone: if cores are scarce, training goes before writing
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WRITER_NICENESS)
        try:
            self._save(step, state, facts)
        except BaseException as error:
            self._failure = step, error

    def _save(self, step: int, state: Any, facts: dict[str, Any]) -> None:
        save = Save(
            step,
            state,
            facts,
            self._copy,
            self.storage,
            self._exchange,
            self.file_bytes,
            self.keep,
            self._check_lease,
            self._fault,
        )
        save.run()
        self.committed = step
        if self.rank == 0:
            log("saved step %d to %s", step, self.storage.describe(save.folder))
            self._told(step)
            retire(self.storage, self.keep, self._fault)

    def keep_beside(self, name: str, content: bytes) -> None:
        """Put a small file beside the commits; one rank calls it."""
        try:
            self.storage.hint(name, content)
        except OSError as error:
            raise refusal(error, f"writing {name}", self.storage) from None

    # -------------------------------------------------------------------------------------------- taking up

    def commits(self) -> list[Commit]:
        """The commits that this process sees whole (sizes and manifest, not every digest), oldest first."""
        found = []
        for _, folder in candidates(self.storage):
            try:
                found.append(Commit.open(self.storage, folder))
            except CheckpointError as error:
                warn("%s", error)
        return found[::-1]

    def require(self, step: int) -> None:
        """Raise unless this job's latest commit is that of `step`; no save is running.

        Raises:
            FailedCheckpointError: it could not be saved, which was only counted then.
        """
        if self.committed != step:
            why = f": {self.failures[-1]}" if self.failures else ""
            raise FailedCheckpointError(f"step {step} is lost, its checkpoint was not saved{why}")

    def newest(self, fallback: bool = False) -> Commit | None:
        """The newest commit, the same on every rank, all of its bytes checked; None if there is none.

        Rank 0 decides. Every rank then looks with its own eyes, and checks its share of the digests.

        Args:
            fallback: when it is damaged take the one before it, with a warning.

        Raises:
            CheckpointError: on every rank, with what is damaged.
        """
        found = self._exchange.on_rank_0(self._candidates)
        for _, folder in found:
            commit, refused = self._look(folder)
            views = self._exchange.all(
                {"digest": commit and commit.digest, "refused": refused and error_as_json(refused)}
            )
            problems = [error_of(view["refused"]) for view in views if view["refused"]] or [
                CheckpointError(
                    f"rank {rank} sees another checkpoint in {self.storage.describe(folder)} than rank 0 does"
                )
                for rank, view in enumerate(views)
                if view["digest"] != views[0]["digest"]
            ]
            if commit and not problems:
                damage = commit.damage(self.rank, self._exchange.size)
                problems = [FailedCheckpointError(found) for share in self._exchange.all(damage) for found in share]
                if not problems:
                    return commit
            if not fallback:
                raise type(problems[0])("\n".join(map(str, problems)))
            if self.rank == 0:
                warn("%s; the checkpoint before it is taken", problems[0])
        if found:
            where = self.storage.describe()
            raise FailedCheckpointError(f"all {len(found)} checkpoints in {where} are damaged: restore one")
        return None

    def open(self, place: str | Path, states: Callable[[str], bool]) -> Commit:
        """Another run's checkpoint, the same on every rank; the wanted `states` checked by all ranks together.

        Raises:
            CheckpointError: there is none, or ranks see different ones.
            FailedCheckpointError: it is damaged.
        """
        folder, digest = self._exchange.on_rank_0(lambda: _place_of(find(place, check=False)))
        commit, refused = None, None
        try:
            commit = find(folder, check=False)
            if commit.digest != digest:
                raise CheckpointError(f"rank {self.rank} sees another checkpoint in {folder} than rank 0 does")
        except CheckpointError as error:
            refused = error_as_json(error)
        for told in self._exchange.all(refused):
            if told:
                raise error_of(told)
        assert commit is not None
        damage = commit.damage(self.rank, self._exchange.size, states)
        if problems := [found for share in self._exchange.all(damage) for found in share]:
            raise FailedCheckpointError("\n".join(problems))
        return commit

    def load(self, reader: Reader, holder: Holder, states: Callable[[str], bool] = lambda state: True) -> None:
        """Fill the holder's slices, on all ranks, from a commit of any layout.

        Args:
            states: which kinds of tensor are wanted; `init_from` wants weights alone.

        Raises:
            CheckpointError: the model and the checkpoint differ in names or shapes (all of them named, before anything
                is loaded), or the checkpoint holds tensors of these states that nothing in the run takes.
        """
        mine = {s.name: list(s.full_shape) for s in holder.slices() if s.state == "weights"}
        model = {name: tuple(shape) for part in self._exchange.all(mine) for name, shape in part.items()}
        where = reader.commit.storage.describe(reader.commit.folder)
        if problems := differences(reader.shapes("weights"), model):
            raise CheckpointError("\n".join([f"{where} is not of this model:", *problems]))
        refused = None
        try:
            holder.load(reader.fill, states)
        except CheckpointError as error:
            refused = error_as_json(error)
        parts = self._exchange.all({"used": sorted(reader.used), "refused": refused})
        for told in (part["refused"] for part in parts if part["refused"]):
            raise error_of(told)
        used = {tuple(key) for part in parts for key in part["used"]}
        wanted = {key for key in reader.manifest.tensors if states(key[0])}
        if left := sorted(f"{state} of {name}" for state, name in wanted - used):
            raise CheckpointError(
                f"{where} holds {len(left)} tensors that this run does not take ({some(left)}): "
                "its optimiser or model is another one"
            )

    # -------------------------------------------------------------------------------------------- together

    def _candidates(self) -> list[tuple[int, str]]:
        for folder in unmarked(self.storage):
            warn("%s has no %s and is not taken: it was never whole, or lost it", self.storage.describe(folder), COMMIT)
        return candidates(self.storage)

    def _look(self, folder: str) -> tuple[Commit | None, CheckpointError | None]:
        """The commit as this rank sees it, or why it cannot be used."""
        try:
            commit = Commit.open(self.storage, folder)
        except CheckpointError as error:
            return None, error
        theirs = commit.manifest.facts.get("run")
        if self.run is not None and theirs is not None and theirs != self.run:
            return None, CheckpointError(
                f"{self.storage.describe(folder)} belongs to another run ({theirs}, this directory is of {self.run}): "
                "move it away, or name it in checkpoint.init_from"
            )
        return commit, None


def _place_of(commit: Commit) -> tuple[str, str]:
    return commit.storage.describe(commit.folder), commit.digest
