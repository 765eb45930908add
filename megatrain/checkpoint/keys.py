"""Which keys of a run file may change when a run is resumed.

What changes speed, place or reporting is free. All else decides what is computed, and a new key does until it is
listed here: a run that goes on with another value is another run, unless `checkpoint.acknowledge` names the key.
"""

from fnmatch import fnmatchcase
from typing import Any

from megatrain.config.build import flat

FREE = (
    "name",
    "layout.*",  # the layout never changes the result
    "log.*",
    "checkpoint.*",
    "hooks",
    "hooks.*",
    "tokenizer",  # a path; its fingerprint is compared with the checkpoint's
    "data.sources.*.path",  # a place; the cursors hold the fingerprint of what must lie there
    "data.workers",
    "data.cache.*",
    "data.allow_pipe",
    "train.eval_every",
    "train.eval_batches",
    "train.drift_every",
    "train.max_skips",
)
"""Shell patterns over dotted keys. `train.steps` is not among them: schedules are functions of the run's length."""

Changes = dict[str, tuple[Any, Any]]
"""(value before, value now) by dotted key; None where there was or is no such key."""


def is_free(key: str) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in FREE)


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> tuple[Changes, Changes]:
    """What differs between the configuration of a commit and that of the run that resumes it: (free, refused).

    Args:
        old, new: as `config.build.plain` gives them.
    """
    before, now = flat(old), flat(new)
    changes = {
        key: (before.get(key), now.get(key))
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not (_empty(before.get(key)) and _empty(now.get(key)))
    }
    free = {key: pair for key, pair in changes.items() if is_free(key)}
    return free, {key: pair for key, pair in changes.items() if key not in free}


def acknowledged(key: str, names: tuple[str, ...]) -> bool:
    """Whether one of `names` is this key or a section that it lies in: `optimizer` covers `optimizer.lr`."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _empty(value: Any) -> bool:
    """No value and an empty list or mapping are the same: `groups: []` becomes `groups.0.match` when one is added."""
    return value is None or value == [] or value == {}
