"""One save: from slices in host memory to a commit, by all ranks together.

It goes through these points, in this order:

1. rank 0 looks at the lease and the free space and makes an empty staging folder;
2. every rank writes its files there and flushes them to disk; a digest of each slice is taken from memory on the way;
3. when all have reported, rank 0 writes the manifest, then COMMIT with the manifest's digest, each flushed to disk;
4. the folder is renamed to step-..., and the rename flushed. Only now is it a checkpoint.

Whatever ends a rank at whatever point leaves the commits before it whole, and a folder without its name or without a
COMMIT, which no reader takes and the next save removes.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatrain.base.errors import CheckpointError, FailedCheckpointError
from megatrain.checkpoint.config import LEAST_KEPT, Keep
from megatrain.checkpoint.exchange import Exchange
from megatrain.checkpoint.manifest import COMMIT, MANIFEST, decode, digest_of, encode
from megatrain.checkpoint.read import candidates, folder_of
from megatrain.checkpoint.retention import discard, sweep
from megatrain.checkpoint.storage import MAKE_ROOM, Storage, no_room, refusal
from megatrain.checkpoint.write import Fault, HostCopy, assemble, write_files


@dataclass(frozen=True)
class Save:
    """What is saved, and where."""

    step: int
    state: Any
    facts: dict[str, Any]
    copy: HostCopy
    """This rank's slices."""
    storage: Storage
    exchange: Exchange
    file_bytes: int
    keep: Keep | None
    check_lease: Callable[[], None]
    fault: Fault

    @property
    def folder(self) -> str:
        return folder_of(self.step)

    def run(self) -> None:
        """All of it.

        Raises:
            CheckpointError: on every rank; the staging folder is gone then.
        """
        needed = self.exchange.gather(self.copy.bytes)
        staging = self.exchange.on_rank_0(lambda: self._prepare(sum(needed)))
        self.fault("before the files")
        reports = self.exchange.gather(self._write(staging))
        self.fault("after the files")
        try:
            self.exchange.on_rank_0(lambda: self._commit(staging, reports))
        except CheckpointError:
            self.exchange.on_rank_0(lambda: discard(self.storage, staging))
            raise

    def _remedy(self) -> str:
        """What makes room: fewer commits only where there are some that may go."""
        more_than_least = self.keep is not None and self.keep.last > LEAST_KEPT
        with contextlib.suppress(OSError):
            if more_than_least and len(candidates(self.storage)) > LEAST_KEPT:
                return f"{MAKE_ROOM}, or lower checkpoint.keep.last"
        return MAKE_ROOM

    def _prepare(self, needed: int) -> str:
        """The empty staging folder of a save that may go on."""
        self.check_lease()
        staging = self.storage.staging(self.folder)
        try:
            sweep(self.storage)
            free = self.storage.free_bytes()
            if free is not None and free < needed:
                raise no_room(self.storage, needed, free, self._remedy())
            self.storage.prepare(staging)
            self.fault("after the folder")
        except OSError as error:
            raise refusal(error, "preparing a checkpoint", self.storage, needed, self._remedy()) from None
        return staging

    def _write(self, staging: str) -> dict[str, Any]:
        """This rank's report: what it wrote, or why it could not."""
        rank = self.exchange.rank
        try:
            written = write_files(self.copy, self.storage, staging, rank, self.file_bytes, self.fault)
            return {"written": written.plain()}
        except FileNotFoundError as error:
            return {"problem": f"rank {rank} does not see rank 0's folder ({error}): share it between nodes"}
        except OSError as error:
            doing = f"writing rank {rank}'s part of a checkpoint"
            return {"problem": str(refusal(error, doing, self.storage, self.copy.bytes, self._remedy()))}
        except Exception as error:  # a defect; told to the others, who would wait for this rank's report
            return {"problem": f"rank {rank} could not write its part of a checkpoint: {error!r}"}

    def _commit(self, staging: str, reports: list[dict[str, Any]]) -> None:
        if problems := [report["problem"] for report in reports if "problem" in report]:
            raise FailedCheckpointError(problems[0])
        text = encode(self.step, self.state, self.facts, *assemble(report["written"] for report in reports))
        decode(text, f"the manifest of step {self.step}")  # refuses what the ranks' slices leave out or hold twice
        try:
            self.storage.write(f"{staging}/{MANIFEST}", [text])
            self.fault("after the manifest")
            self.check_lease()  # where nothing can be renamed, COMMIT is the instant
            self.storage.write(f"{staging}/{COMMIT}", [digest_of(text).encode() + b"\n"])
            self.fault("after COMMIT")
            self.check_lease()
            self.fault("before the rename")
            self.storage.publish(staging, self.folder)
        except OSError as error:
            raise refusal(error, f"committing step {self.step}", self.storage, remedy=self._remedy()) from None
        self.fault("after the rename")
        with contextlib.suppress(OSError):  # for people; no reader trusts it
            self.storage.hint("latest", f"{self.folder}\n".encode())
