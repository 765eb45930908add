"""Ranks meet: the one place that initialises torch.distributed."""

import contextlib
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

from megatrain.base.device import Device
from megatrain.base.errors import ConfigError, RunError
from megatrain.cluster.identity import Identity

if TYPE_CHECKING:
    import torch.distributed as dist

PATIENCE = timedelta(minutes=10)
"""How long a rank waits for others: at the start, and in each collective, so longer than the slowest honest step."""


def connect(identity: Identity, device: Device, timeout: timedelta = PATIENCE, *, even_alone: bool = False) -> None:
    """Make `device` current and open the default process group with all other ranks.

    A process that stands alone gets no group, unless `even_alone`.

    Raises:
        ConfigError: the port is taken.
        RunError: the ranks did not find each other in `timeout`.
    """
    import torch.distributed as dist

    device.use()
    if identity.alone and not even_alone:
        return
    try:
        if identity.launcher == "torchrun":  # its agent holds the store already, and env:// knows how to ask it
            dist.init_process_group(device.backend, init_method="env://", timeout=timeout)
        else:
            store = _store(identity, timeout)
            rank, world = identity.rank, identity.world
            dist.init_process_group(device.backend, store=store, rank=rank, world_size=world, timeout=timeout)
    except (dist.DistError, OSError, RuntimeError) as error:
        kind = ConfigError if "EADDRINUSE" in str(error) else RunError  # a taken port is a wrong call
        raise kind(_no_meeting(identity, timeout, error)) from error


def disconnect() -> None:
    """Close the default process group, if there is one."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def connected(
    identity: Identity, device: Device, timeout: timedelta = PATIENCE, *, even_alone: bool = False
) -> Iterator[None]:
    """`connect` now and `disconnect` at the end."""
    connect(identity, device, timeout, even_alone=even_alone)
    try:
        yield
    finally:
        disconnect()


LOST = ("Connection closed by peer", "Connection reset", "Timed out waiting", "Broken pipe", "NCCL error", "Watchdog")
"""Words by which torch's backends say that a collective failed because of another rank."""


def lost_peer(error: Exception) -> bool:
    """Whether a collective failed because another rank has ended or does not answer."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in LOST))


def _store(identity: Identity, timeout: timedelta) -> "dist.Store":
    """The key-value store through which ranks exchange their addresses; rank 0 serves it."""
    import torch.distributed as dist

    if identity.alone:
        return dist.HashStore()
    return dist.TCPStore(
        identity.master_addr,
        identity.master_port,
        identity.world,
        is_master=identity.rank == 0,
        timeout=timeout,
        master_listen_fd=identity.listening,
    )


def _no_meeting(identity: Identity, timeout: timedelta, error: Exception) -> str:
    here = f"rank {identity.rank} of {identity.world} on {socket.gethostname()} (started by {identity.launcher})"
    place = f"{identity.master_addr}:{identity.master_port}"
    cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    advice = (
        "is the port taken? choose another with MASTER_PORT"
        if identity.rank == 0
        else "is rank 0 running, and can this node reach that address?"
    )
    return f"{here} could not meet the others at {place} within {timeout.total_seconds():g} s: {cause}; {advice}"
