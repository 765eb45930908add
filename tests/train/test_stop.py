"""A word to stop is heard once, agreed by all ranks, and harmless where signals cannot be heard."""

import os
import signal
import threading
from pathlib import Path

import torch.distributed as dist

from megatrain.parallel.mesh import ALONE, Mesh
from megatrain.train.run import train
from megatrain.train.stop import StopRequest, StopVote
from tests.ranks import run
from tests.train.small import metrics, write_run


def test_each_signal_asks_once_and_the_former_handler_comes_back() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        former = signal.getsignal(number)
        with StopRequest().listening() as request:
            assert not StopVote(request, ALONE).agreed()
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # a launcher may hand on what the terminal has sent already
            assert StopVote(request, ALONE).agreed()
        assert signal.getsignal(number) is former


def steps_until_agreed(asking: int) -> list[bool]:
    request = StopRequest()
    vote = StopVote(request, Mesh.of(dp=dist.get_world_size()).at(dist.get_rank()).connect().axis("world"))
    seen = []
    for step in range(6):
        if step == 2 and dist.get_rank() == asking:
            request.ask()
        seen.append(vote.agreed())
    vote.close()
    return seen


def test_all_ranks_stop_at_the_same_step_when_one_is_asked() -> None:
    first, *others = run(steps_until_agreed, 3, 1)
    assert first == [False, False, False, True, True, True]
    assert others == [first, first]


def test_a_run_in_a_thread_trains_without_hearing_signals(tmp_path: Path, text_data: Path) -> None:
    path = write_run(tmp_path, text_data, train__steps=2)
    thread = threading.Thread(target=train, args=(path,))
    thread.start()
    thread.join()
    assert [line["step"] for line in metrics(tmp_path / "runs/small")] == [1, 2]
