"""A run's folder: config.yaml, metrics.jsonl, events.jsonl, checkpoints/."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatrain.base.errors import ConfigError
from megatrain.base.files import read_json_lines, written_whole
from megatrain.config.source import dump, read


@dataclass(frozen=True)
class RunFolder:
    """Reads and writes the files of a run; rank 0 alone writes."""

    path: Path

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    def make(self) -> None:
        """Create the folder.

        Raises:
            ConfigError: it cannot be made or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the run folder {self.path} cannot be made ({error.strerror}): choose another log.dir or name"
            ) from None
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise ConfigError(
                f"the run folder {self.path} cannot be written: change its permissions, or choose another log.dir"
            )

    def read_config(self) -> dict[str, Any] | None:
        """The resolved configuration of the run that lives here, if one does."""
        if not self.config.exists():
            return None
        try:
            return read(self.config).plain()
        except ConfigError as error:
            raise ConfigError(f"{error}: restore {self.config}, or choose another name") from None

    def write_config(self, config: dict[str, Any]) -> None:
        with written_whole(self.config) as file:
            file.write(dump(config))

    def note(self, kind: str, step: int, **facts: Any) -> None:
        """Append a line to events.jsonl."""
        line = {"time": round(time.time(), 3), "step": step, "kind": kind, **facts}
        with open(self.events, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def saved_step(self) -> int | None:
        """The last step that was committed since the run was started anew, by its events; None if none was."""
        step = None
        for line in read_json_lines(self.events):
            if line["kind"] == "started":
                step = None
            elif line["kind"] == "saved":
                step = line["step"]
        return step

    def rewind_metrics(self, step: int) -> None:
        """Cut the metrics after `step`, where a resumed run goes on, and keep what is cut in events.jsonl.

        They belong to steps that are taken again, since the run ended after them without saving.
        """
        if not self.metrics.exists():
            return
        lines = read_json_lines(self.metrics)
        beyond = [line for line in lines if line["step"] > step]
        kept = [line for line in lines if line["step"] <= step]
        with written_whole(self.metrics) as file:
            for line in kept:
                file.write(json.dumps(line) + "\n")
        if beyond:
            self.note("rewound", step, last_step=beyond[-1]["step"], lines=beyond)

    def refuse_foreign(self) -> None:
        """A folder with files of something else is not written into.

        Raises:
            ConfigError: there are files, and none of a run.
        """
        if self.path.exists() and any(self.path.iterdir()) and not self.config.exists():
            known = {".", "checkpoints", "events.jsonl", "metrics.jsonl", "lease", "wandb.log"}
            foreign = sorted(p.name for p in self.path.iterdir() if p.name not in known and not p.name.startswith("."))
            if foreign:
                raise ConfigError(
                    f"{self.path} holds files of something else ({', '.join(foreign[:5])}): choose another name"
                )
