"""Errors that a user can act on. Each says what we got, what is allowed and what to do.

The command line prints a `UserError` as one message without a traceback and exits with its code; all else is a bug.
"""

from collections.abc import Iterable
from difflib import get_close_matches

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the run was saved and can be resumed


class UserError(Exception):
    """Something outside the program is not as it must be, and the message says what to do about it."""

    exit_code = EXIT_USAGE


class ConfigError(UserError):
    """Everything that is wrong with a configuration, at once."""

    def __init__(self, problems: Iterable[str] | str):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class LayoutError(ConfigError):
    """A layout that cannot hold this model or this number of ranks."""


class DataError(UserError):
    """A data set that is missing, damaged or does not fit the run."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or does not fit the run."""


class FailedCheckpointError(CheckpointError):
    """A checkpoint that is damaged, or could not be written or read: the call was right, and something failed."""

    exit_code = EXIT_FAILURE


class RunError(UserError):
    """A run that cannot go on although its configuration is sound (for example: too many non-finite steps)."""

    exit_code = EXIT_FAILURE


class PreemptedError(UserError):
    """The run was asked to stop, has saved its state and can be resumed."""

    exit_code = EXIT_PREEMPTED


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice most like `name`, or None if none is alike."""
    found = get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return found[0] if found else None


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """The end of a sentence that refuses `name`: the nearest choice, then all of them.

    >>> did_you_mean("adamv", ["adamw", "lion"])
    'did you mean adamw? (allowed: adamw, lion)'
    """
    choices = sorted(choices)
    if not choices:
        return "nothing is allowed here"
    allowed = f"allowed: {', '.join(choices)}"
    guess = nearest(name, choices)
    return f"did you mean {guess}? ({allowed})" if guess else allowed
