"""The helper that starts ranks must itself be trusted: it reports failures and leaves nothing behind."""

import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import UNCONNECTED, RankError, run


def sum_over_ranks(value: float) -> torch.Tensor:
    x = torch.tensor(value + dist.get_rank())
    dist.all_reduce(x)
    return x


def fail_on_rank_1() -> None:
    print("about to fail")
    if dist.get_rank() == 1:
        raise ValueError("the cause")
    dist.barrier()


def hang_on_rank_0() -> int:
    if dist.get_rank() == 0:
        time.sleep(1000)
    return os.getpid()


def leave_a_child() -> None:
    subprocess.Popen(["sleep", "1000"])


def die() -> None:
    os._exit(7)


def lose_a_connection(marks: Path, times: int) -> int:
    """Fail as gloo does when it cannot connect, in the first `times` starts."""
    starts = len(list(marks.iterdir()))
    (marks / str(starts)).touch()
    if starts < times:
        raise RuntimeError(f"{UNCONNECTED} with [pair.cc:553] Connection closed by peer")
    return starts


def threads_and_group() -> tuple[int, int, str]:
    return torch.get_num_threads(), dist.get_world_size(), os.environ["TORCH_EXTENSIONS_DIR"]


def test_each_rank_returns_its_result_in_rank_order():
    assert run(sum_over_ranks, 3, 1.0) == [torch.tensor(6.0)] * 3


def test_each_rank_has_one_thread_and_its_own_extensions_folder():
    found = run(threads_and_group, 2)
    assert [f[:2] for f in found] == [(1, 2), (1, 2)]
    assert found[0][2] != found[1][2]


def test_the_failing_rank_is_named_with_its_traceback():
    with pytest.raises(RankError, match=r"(?s)rank 1: Traceback.*fail_on_rank_1.*ValueError: the cause.*about to fail"):
        run(fail_on_rank_1, 2, timeout=600)


def test_a_hanging_rank_is_killed_and_its_place_shown():
    with pytest.raises(RankError, match=r"(?s)ranks \[0\] of 2 were not done after 2 s.*hang_on_rank_0"):
        run(hang_on_rank_0, 2, timeout=2)


def test_a_process_left_behind_is_a_failure():
    with pytest.raises(RankError, match="rank 0 left a process behind"):
        run(leave_a_child, 1)


def test_a_rank_that_dies_silently_is_reported_with_its_exit_code():
    with pytest.raises(RankError, match="rank 0: died with exit code 7"):
        run(die, 1)


def test_ranks_that_gloo_could_not_connect_are_started_once_more(tmp_path: Path):
    assert run(lose_a_connection, 1, tmp_path, 1) == [1]


def test_ranks_that_gloo_cannot_connect_twice_are_a_failure(tmp_path: Path):
    with pytest.raises(RankError, match=UNCONNECTED):
        run(lose_a_connection, 1, tmp_path, 2)
