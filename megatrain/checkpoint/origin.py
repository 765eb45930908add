"""Where a checkpoint comes from: the code's revision and the versions it ran with."""

import os
import platform
import socket
import subprocess
import time
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("megatrain", "torch", "deepspeed", "tokenizers", "safetensors", "numpy")


def origin(world_size: int) -> dict[str, Any]:
    return {
        "time": time.time(),
        "host": socket.gethostname(),
        "ranks": world_size,
        "user": os.getuid(),
        "revision": revision(),
        "versions": versions(),
    }


@cache
def revision() -> str | None:
    """The git revision of this package's source, with "+" if files differ from it; None outside of a checkout."""
    try:
        _git("ls-files", "--error-unmatch", __file__)  # a checkout that this file merely lies in is not ours
        return _git("rev-parse", "HEAD") + ("+" if _git("status", "--porcelain", "--", "..") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*words: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


@cache
def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
