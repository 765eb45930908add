"""Meeting others: what a rank says when it cannot, and what one that is alone does."""

import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatrain.base.device import Device
from megatrain.base.errors import ConfigError, RunError
from megatrain.cluster.identity import Identity, identity_of
from megatrain.cluster.start import connect, connected, disconnect

CPU = Device.of("cpu")


def test_alone_no_group_is_opened_unless_asked():
    connect(identity_of({}), CPU)
    assert not dist.is_initialized()
    disconnect()  # harmless
    with connected(identity_of({}), CPU, even_alone=True):
        total = torch.ones(2)
        dist.all_reduce(total)
        assert total.tolist() == [1, 1]
        assert dist.get_world_size() == 1
    assert not dist.is_initialized()


def test_a_rank_that_finds_nobody_says_who_it_is_and_where_it_looked():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    nobody = Identity(1, 2, 1, 2, 0, "srun", "127.0.0.1", port)
    with pytest.raises(RunError) as caught:
        connect(nobody, CPU, timedelta(seconds=0.5))
    message = str(caught.value)
    assert message.startswith("rank 1 of 2 on ")
    assert f"(started by srun) could not meet the others at 127.0.0.1:{port} within 0.5 s" in message
    assert message.endswith("is rank 0 running, and can this node reach that address?")


def test_a_port_that_is_taken_is_said_to_be():
    with socket.create_server(("0.0.0.0", 0)) as taken:
        first = Identity(0, 2, 0, 2, 0, "environment", "127.0.0.1", taken.getsockname()[1])
        with pytest.raises(ConfigError, match="is the port taken\\? choose another with MASTER_PORT"):
            connect(first, CPU, timedelta(seconds=0.5))
