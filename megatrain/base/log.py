"""What a person reads while a run goes on. Only rank 0 speaks, unless a rank has something of its own to say."""

import logging
import sys
from typing import Any


def start_logging(rank: int = 0, verbose: bool = False) -> None:
    """Send megatrain's messages to stderr: rank 0 in full, other ranks only their warnings, with their number."""
    logger = logging.getLogger("megatrain")
    logger.setLevel(logging.DEBUG if verbose else logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    logger.handlers[:] = [handler]


def log(message: str, *arguments: Any) -> None:
    logging.getLogger("megatrain").info(message, *arguments)


def warn(message: str, *arguments: Any) -> None:
    logging.getLogger("megatrain").warning("warning: " + message, *arguments)
