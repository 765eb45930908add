"""The process that talks to wandb: settings on the first line of its input, then a record a line."""

import contextlib
import json
import signal
import sys
import tempfile
from pathlib import Path


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # it ends when its input does
    settings = json.loads(sys.stdin.readline())
    import wandb

    folder = Path(settings["dir"])
    if not folder.is_dir():
        folder = Path(tempfile.gettempdir())
    run = wandb.init(
        mode=settings["mode"],
        project=settings["project"],
        name=settings["name"],
        id=settings["id"],
        resume="allow",
        dir=str(folder),
        config=settings["config"],
        settings=wandb.Settings(silent=True, console="off"),
    )
    for line in sys.stdin:
        with contextlib.suppress(json.JSONDecodeError):  # the run was killed in the middle of a line
            record = json.loads(line)
            run.log(record, step=record["step"])
    run.finish()


if __name__ == "__main__":
    main()
