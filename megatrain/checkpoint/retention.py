"""What becomes of old commits, and of what saves that were cut off have left behind."""

from collections.abc import Callable

from megatrain.base.errors import CheckpointError
from megatrain.base.log import warn
from megatrain.checkpoint.config import Keep
from megatrain.checkpoint.manifest import COMMIT
from megatrain.checkpoint.read import Commit, candidates, folder_of
from megatrain.checkpoint.storage import Storage

SCORE = "score"
"""The fact of a commit that `Keep.best` goes by: held-out loss at its step."""


def retire(storage: Storage, keep: Keep, fault: Callable[[str], None]) -> None:
    """Delete the commits that `keep` does not keep; that it fails is no reason to end a run.

    A damaged one is not counted among the newest, and not deleted: it may be all that is left of its step.
    """
    try:
        whole, scores = {}, {}
        for step, folder in candidates(storage):
            try:
                score = Commit.open(storage, folder).manifest.facts.get(SCORE)
            except CheckpointError as error:
                warn("%s", error)
            else:
                whole[step], scores[step] = folder, score
        for step in keep.superfluous(scores):
            fault("before a deletion")
            storage.delete(whole[step], COMMIT)
            fault("after a deletion")
    except OSError as error:
        warn("old checkpoints in %s could not be removed: %s", storage.describe(), error)


def sweep(storage: Storage) -> None:
    """Remove what saves and deletions that were cut off have left behind; a commit gets its name back."""
    for step, folder in candidates(storage):
        if folder != folder_of(step):
            storage.publish(folder, folder_of(step))
    whole = {folder for _, folder in candidates(storage)}
    for folder in storage.folders():
        if folder.startswith(".step-") and folder not in whole:
            discard(storage, folder)


def discard(storage: Storage, staging: str) -> None:
    """Remove a folder that is no commit."""
    try:
        storage.delete(staging, COMMIT)
    except OSError as error:
        warn("%s could not be removed: %s", storage.describe(staging), error)
