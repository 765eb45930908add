"""The seam between the loop and everything that happens beside the steps."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

Record = dict[str, Any]
"""What is known of one finished step, under the names of metrics.jsonl; hooks may add to it before it is written."""


class Hook:
    """Called by the loop on every rank. The methods here do nothing; a hook overrides what it needs."""

    def due(self, step: int) -> bool:
        """This hook needs the state right after `step`: the loop then waits for the step's numbers at once."""
        return False

    def after_step(self, record: Record) -> None:
        """A step's numbers are known. Where `due` was true, the state is that of this very step."""

    def state(self) -> Any:
        """What a checkpoint must remember of this hook, as JSON values; None where that is nothing."""

    def restore(self, state: Any) -> None:
        """Take up what `state` gave when the checkpoint was saved that the run goes on from."""

    def rewound(self, step: int) -> None:
        """The weights are again those after `step`: what was told of later steps is no longer so."""

    def finish(self, outcome: str) -> None:
        """The loop has ended: `finished`, `preempted` or `failed`. Must not raise and must not wait long."""


def states_of(hooks: Sequence[Hook]) -> dict[str, Any]:
    """What a checkpoint remembers of hooks, by their class, and where there are several of one by number."""
    return {name: state for name, hook in _named(hooks).items() if (state := hook.state()) is not None}


def restore_states(hooks: Sequence[Hook], states: dict[str, Any]) -> None:
    """Give each hook what `states_of` found of it; hooks that were not there then start anew."""
    for name, hook in _named(hooks).items():
        if name in states:
            hook.restore(states[name])


def _named(hooks: Sequence[Hook]) -> dict[str, Hook]:
    seen: Counter[str] = Counter()
    found = {}
    for hook in hooks:
        kind = type(hook).__name__
        seen[kind] += 1
        found[kind if seen[kind] == 1 else f"{kind}.{seen[kind]}"] = hook
    return found


@dataclass(frozen=True)
class Handle:
    """What a hook may see of a run, and what it may ask for."""

    folder: Path
    rank: int
    world: int
    total_steps: int
    first_step: int
    """The step that comes first in this process: 1, or where a resumed run goes on."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Things that do not change: name, parameters, device, layout, ..."""
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved run file as plain values."""
    evaluate: Callable[[], Record] = dict
    """Held-out loss of the weights as they are now; every rank must call it."""
    examine: Callable[[], Record] = dict
    """What can be known of the step whose record is told now (`train.examine`); every rank must call it."""
    save: Callable[[float | None], None] = lambda held_out_loss: None
    """Write a checkpoint of the state as it is now, with its held-out loss if known; every rank must call it."""
    limit_loss: Callable[[int, float], None] = lambda step, most: None
    """Do not take a step that is still to come if its loss is above `most`; every rank must say the same."""
    rewind: Callable[[], None] = lambda: None
    """Go back to the newest checkpoint after this step, and on from there with the data that comes next; every rank
    must call it at the same step."""
    stop: Callable[[], None] = lambda: None
    """End the run after this step, saved and resumable; every rank must call it at the same step."""
    note: Callable[..., None] = lambda kind, **facts: None
    """Write a line to events.jsonl (rank 0 does, others may call)."""


class Periodic(Hook):
    """Due every so many steps (0: never) and after the last one."""

    def __init__(self, every: int, handle: Handle):
        self.every, self.handle = every, handle

    def due(self, step: int) -> bool:
        return step == self.handle.total_steps or (self.every > 0 and step % self.every == 0)


class HookChoice(Protocol):
    """A choice of the run file's `hooks` list."""

    def build(self, handle: Handle) -> Hook: ...
