"""The helper that starts ranks must itself be trusted: it reports failures and leaves nothing behind."""

import os
import subprocess
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, run


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
