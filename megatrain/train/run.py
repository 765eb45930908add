"""`train`: run a run file."""

from collections.abc import Sequence
from pathlib import Path

from megatrain.base.errors import ConfigError
from megatrain.train.config import Run, read_run


def train(run: str | Path | Run, overrides: Sequence[str] = ()) -> str:
    """Run a run file (or resume it) in this process, which may be one rank of many.

    Args:
        run: path of a run file, or a `Run`.
        overrides: `key=value` words, for a path.

    Returns:
        "finished", or "already finished" where there was nothing left to do.

    Raises:
        ConfigError, DataError, CheckpointError: what the user can mend, in one message.
        PreemptedError: the run was asked to stop; it was saved and can be resumed.
        RunError: the run cannot go on.
    """
    from megatrain.train.assemble import launch

    if isinstance(run, Run):
        if overrides:
            raise ConfigError("overrides go with the path of a run file, not with a Run: use dataclasses.replace")
        return launch(run)
    return launch(read_run(run, overrides).run)
