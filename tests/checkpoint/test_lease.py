"""One job at a time writes to a run directory, and one that lost it cannot commit."""

import json
import os
import subprocess
import sys
import textwrap
import time

import pytest

from megatrain.base.errors import CheckpointError
from megatrain.checkpoint import lease as module
from megatrain.checkpoint.checkpoints import Checkpoints
from megatrain.checkpoint.lease import Lease
from tests.checkpoint.toy import Toy, full_tensors


def test_a_second_job_is_refused_until_the_first_releases(tmp_path):
    first = Lease.take(tmp_path)
    with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()} on this node"):
        Lease.take(tmp_path)
    first.check()
    first.release()
    second = Lease.take(tmp_path)
    assert second.number == first.number + 1
    second.release()


def test_the_lease_of_a_killed_process_is_taken_over_at_once(tmp_path):
    code = (
        "import os, sys; from megatrain.checkpoint.lease import Lease; Lease.take(sys.argv[1]); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    lease = Lease.take(tmp_path)
    assert lease.number == 2
    lease.release()


def other_node(folder, number: int, seconds_ago: float) -> None:
    path = folder / "lease" / f"{number:08d}"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"host": "node-7 abc", "pid": 1, "started": "1"}))
    os.utime(path, (time.time() - seconds_ago,) * 2)


def test_a_job_on_another_node_holds_its_lease_while_it_gives_signs_of_life(tmp_path, monkeypatch):
    other_node(tmp_path, 4, seconds_ago=2)
    path = tmp_path / "lease" / "00000004"
    monkeypatch.setattr(module.time, "sleep", lambda seconds: os.utime(path))  # a beat, while we look
    with pytest.raises(CheckpointError, match=r"in use by process 1 on node-7, which lives"):
        Lease.take(tmp_path)


def test_the_lease_of_a_job_that_died_on_another_node_is_taken_when_its_time_is_over(tmp_path, monkeypatch):
    other_node(tmp_path, 4, seconds_ago=2)
    path, waited = tmp_path / "lease" / "00000004", []

    def silence(of) -> float:
        return 2 + 10 * len(waited) if of == path else 0.0

    monkeypatch.setattr(module.time, "sleep", waited.append)
    monkeypatch.setattr(module, "_silence", silence)
    lease = Lease.take(tmp_path)
    assert lease.number == 5
    assert len(waited) == 3  # 2, 12, 22 and 32 seconds: the limit is 30
    lease.release()


def test_a_beat_is_a_sign_of_life(tmp_path):
    lease = Lease.take(tmp_path)
    path = tmp_path / "lease" / "00000001"
    os.utime(path, (0, 0))
    lease.beat()
    assert path.stat().st_mtime > 0
    lease.release()


def test_a_job_whose_lease_was_taken_over_cannot_commit(tmp_path):
    zombie = Checkpoints(tmp_path / "checkpoints")
    zombie.claim(tmp_path)
    zombie.save(1, Toy(full_tensors()).slices(), {}, {}, asynchronous=False)
    other_node(tmp_path, zombie.lease.number + 1, seconds_ago=0)  # while it could not be seen
    with pytest.raises(CheckpointError, match=r"lease 1 on .* was lost .now 2 holds it"):
        zombie.save(2, Toy(full_tensors()).slices(), {}, {}, asynchronous=False)
    assert [c.step for c in zombie.commits()] == [1]
    zombie.close()


def test_a_lease_lost_during_a_save_stops_its_commit(tmp_path):
    def lose(point: str) -> None:
        if point == "after COMMIT":
            other_node(tmp_path, 2, seconds_ago=0)

    zombie = Checkpoints(tmp_path / "checkpoints", fault=lose)
    zombie.claim(tmp_path)
    with pytest.raises(CheckpointError, match="was lost"):
        zombie.save(1, Toy(full_tensors()).slices(), {}, {}, asynchronous=False)
    assert zombie.commits() == []
    zombie.close()


def test_of_many_jobs_that_start_together_one_gets_the_directory(tmp_path):
    code = textwrap.dedent("""
        import sys
        from megatrain.base.errors import CheckpointError
        from megatrain.checkpoint.lease import Lease
        sys.stdin.readline()
        try:
            Lease.take(sys.argv[1])
            print("mine", flush=True)
        except CheckpointError:
            print("refused", flush=True)
        sys.stdin.readline()
    """)
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for job in jobs:
        job.stdin.write("\n")
        job.stdin.flush()
    answers = [job.stdout.readline().strip() for job in jobs]
    for job in jobs:
        job.communicate("\n")
    assert sorted(answers) == ["mine", "refused", "refused", "refused"]


def test_a_run_keeps_its_identity_and_a_lost_one_comes_back_from_its_commits(tmp_path):
    for _ in range(2):
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        checkpoints.claim(tmp_path)
        identity = checkpoints.run
        checkpoints.save(1, Toy(full_tensors()).slices(), {}, {})
        checkpoints.close()
        (tmp_path / "lease" / "run").unlink()
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.claim(tmp_path)
    assert checkpoints.run == identity
    assert checkpoints.newest().step == 1
    checkpoints.close()
