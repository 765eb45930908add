"""The run file as a whole."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from megatrain.checkpoint.config import Checkpoint
from megatrain.config.build import build, plain
from megatrain.config.source import Node, read
from megatrain.data.config import Data
from megatrain.data.store import redacted
from megatrain.engine.api import Precision
from megatrain.engine.layout import Layout
from megatrain.models import MODEL
from megatrain.optim.optimizer import OPTIMIZER
from megatrain.optim.schedule import SCHEDULE
from megatrain.train.hooks import HOOK

MOST_STEPS = 10**9
"""More is a slip of the finger."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """How long and how much at a time. Exactly one of `steps` and `tokens` is given."""

    global_batch: int
    """Sequences of one optimiser step, over all ranks."""
    steps: Annotated[int | None, "steps"] = None
    tokens: Annotated[int | None, "tokens"] = None
    eval_every: int = 0
    """Steps between evaluations of the held-out split; 0 evaluates only at the end."""
    eval_batches: int = 8
    """Global batches of held-out data in one evaluation (fewer if the split is smaller)."""
    drift_every: int = 1000
    """Steps between checks that copies of weights on several ranks still have the same bits; 0 checks only at start."""
    max_skips: int = 20
    """Steps in a row that may be skipped because a gradient was not finite, or the loss too high for hook `spikes`; one
    more ends the run."""

    def problems(self) -> list[str]:
        found = []
        if (self.steps is None) == (self.tokens is None):
            found.append("give exactly one of steps and tokens")
        for name in ("global_batch", "eval_batches"):
            if getattr(self, name) < 1:
                found.append(f"{name}={getattr(self, name)}: it must be at least 1")
        for name in ("eval_every", "drift_every", "max_skips"):
            if getattr(self, name) < 0:
                found.append(f"{name}={getattr(self, name)}: it must be at least 0")
        if (self.steps or 0) > MOST_STEPS:
            found.append(f"steps={self.steps}: at most {MOST_STEPS:,} can be taken")
        if self.steps == 0 or self.tokens == 0:
            found.append("a run of nothing: steps or tokens must be at least 1")
        return found


@dataclass(frozen=True, kw_only=True)
class WandbLog:
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online where there is a key, else offline (`wandb sync` sends it later)."""
    project: str = "megatrain"


@dataclass(frozen=True, kw_only=True)
class Log:
    dir: str = "runs"
    """The folder that run folders are made in."""
    wandb: WandbLog = field(default_factory=WandbLog)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run file: everything that decides what is trained, and where it is written."""

    name: str
    """Of the run's folder; the file's stem by default."""
    model: Annotated[Any, MODEL, "decoder"]
    data: Data
    train: Train
    schedule: Annotated[Any, SCHEDULE, "cosine"]
    optimizer: Annotated[Any, OPTIMIZER, "adamw"]
    seed: int = 0
    tokenizer: str | None = None
    """The data set's own by default; a tokenizer.json given here must be that very one."""
    layout: Layout = field(default_factory=Layout)
    precision: Precision = field(default_factory=Precision)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
    hooks: Annotated[tuple[Any, ...], HOOK] = ()

    @property
    def folder(self) -> Path:
        return Path(self.log.dir) / self.name

    @property
    def commits(self) -> str:
        """The folder or URL that holds the step-... folders."""
        if self.checkpoint.dir is None:
            return str(self.folder / "checkpoints")
        return f"{self.checkpoint.dir.rstrip('/')}/{self.name}"

    @property
    def total_steps(self) -> int:
        """Steps of the whole run; a budget of tokens is rounded up to whole steps."""
        return self.train.steps or self.data.steps(self.train.tokens or 0, self.train.global_batch)

    def shown(self) -> dict[str, Any]:
        """The resolved run file as plain values without passwords in addresses: for files, logs and dashboards."""
        found = plain(self)
        for source in found["data"]["sources"]:
            source["path"] = redacted(source["path"])
        if found["checkpoint"]["dir"]:
            found["checkpoint"]["dir"] = redacted(found["checkpoint"]["dir"])
        return found

    def problems(self) -> list[str]:
        found = []
        if not self.name or "/" in self.name or self.name.startswith("."):
            found.append(f"name is {self.name!r}: it names a folder, so no slash and no dot in front")
        return found


@dataclass(frozen=True)
class RunFile:
    """A run and where each of its values was written (by dotted key)."""

    run: Run
    origins: dict[str, str]


def read_run(path: str | Path, overrides: Sequence[str] = ()) -> RunFile:
    """The run file at `path` with `key=value` overrides.

    Raises:
        ConfigError: with everything that is wrong.
    """
    tree = read(path, overrides)
    tree.value.setdefault("name", Node(Path(path).stem, str(path)))
    run, origins = build(Run, tree, also_allowed=("base",))
    return RunFile(run, origins)
