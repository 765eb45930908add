"""Ranks started on this machine: real processes, real signals, one exit code."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatrain.base.errors import ConfigError
from megatrain.cluster import local_ranks
from megatrain.cluster.identity import LOCAL_LAUNCHER, identity_of
from megatrain.cluster.local_ranks import run_local_ranks

ROOT = Path(__file__).parents[2]
PATIENCE = 60  # seconds; only a broken launcher waits that long


@pytest.fixture
def script(tmp_path: Path):
    """The command of a rank, from a body that may use `rank`, `say` (to stderr, as our logger does) and `here`."""

    def make(body: str) -> list[str]:
        head = f"""
            import os, signal, sys, time, json
            from pathlib import Path
            rank, here = int(os.environ["RANK"]), Path({str(tmp_path)!r})
            def say(text): os.write(2, f"[rank {{rank}}] {{text}}\\n".encode())  # whole even from a signal handler
        """
        path = tmp_path / "rank.py"
        path.write_text(textwrap.dedent(head) + textwrap.dedent(body))
        return [sys.executable, str(path)]

    return make


@pytest.fixture
def launcher():
    """Starts the launcher in a process of its own, whose signals and terminal are the test's to play with."""
    started = []

    def start(n: int, command: list[str], **streams) -> subprocess.Popen:
        code = (
            "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); "  # the tests may run under nohup
            f"from megatrain.cluster.local_ranks import run_local_ranks as r; sys.exit(r({n}, {command!r}))"
        )
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | streams
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **streams)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def lines(process: subprocess.Popen, n: int) -> list[str]:
    return sorted(process.stdout.readline().strip() for _ in range(n))


def wait_until_gone(pid: int) -> None:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ended, _, _ = select.select([fd], [], [], PATIENCE)
        assert ended, f"process {pid} lives on"
    finally:
        os.close(fd)


# ------------------------------------------------------------------------------------------------ one exit code


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0], 0),
        ([75, 75], 75),
        ([75, 0], 75),
        ([2, 2], 2),
        ([0, 2], 2),
        ([1, 1], 1),
        ([75, 3], 1),
        ([0, 1, 0], 1),
    ],
)
def test_one_exit_code_stands_for_all_ranks(script, codes, expected):
    assert run_local_ranks(len(codes), script(f"sys.exit({codes}[rank])")) == expected


def test_a_refused_call_is_explained_once(script, capfd):
    command = script('print("seed is missing", file=sys.stderr); sys.exit(2)')
    assert run_local_ranks(3, command) == 2
    assert capfd.readouterr().err == "seed is missing\n"


def test_a_call_that_one_rank_refuses_is_explained_in_its_words(script, capfd):
    assert run_local_ranks(2, script('rank and print("n2 has no /data", file=sys.stderr); sys.exit(2 * rank)')) == 2
    assert capfd.readouterr().err == "rank 1 said:\nn2 has no /data\n"


def test_a_failed_rank_is_shown_with_its_traceback(script, capfd):
    assert run_local_ranks(2, script('rank == 1 and 1 / 0\nprint("fine")')) == 1
    out, err = capfd.readouterr()
    assert out == "fine\n"
    assert "ZeroDivisionError: division by zero\nrank 1 of 2 failed with exit code 1; the others were ended" in err


def test_a_killed_rank_is_named_with_its_signal(script, capfd):
    assert run_local_ranks(2, script("rank == 1 and os.kill(os.getpid(), signal.SIGKILL)")) == 1
    assert "rank 1 of 2 was ended by SIGKILL (out of memory?); the others were ended" in capfd.readouterr().err


def test_rank_0_speaks_and_others_are_heard_when_they_warn(script, capfd):
    body = 'print(f"out {rank}")\nprint(f"err {rank}", file=sys.stderr)\nrank and say("warning: slow disk")'
    assert run_local_ranks(2, script(body)) == 0
    assert capfd.readouterr() == ("out 0\n", "err 0\n[rank 1] warning: slow disk\n")


def test_ranks_that_outlive_a_failure_are_ended_with_all_they_started(script, tmp_path, monkeypatch):
    monkeypatch.setattr(local_ranks, "GRACE_SECONDS", 0.0)
    body = """
        import subprocess
        if rank == 0:
            child = subprocess.Popen(["sleep", "600"])
            (here / "writing").write_text(f"{os.getpid()} {child.pid}")
            (here / "writing").rename(here / "pids")
            child.wait()
        while not (here / "pids").exists(): time.sleep(0.01)
        sys.exit(1)
    """
    assert run_local_ranks(2, script(body)) == 1
    for pid in (tmp_path / "pids").read_text().split():
        wait_until_gone(int(pid))


def test_no_rank_is_refused():
    with pytest.raises(ConfigError, match="--nproc 0 starts no rank"):
        run_local_ranks(0, ["true"])


# ------------------------------------------------------------------------------------------------ who they are


def test_each_rank_knows_who_it_is_whatever_the_launcher_was_told(script, tmp_path):
    inherited = os.environ | {"RANK": "7", "OMPI_COMM_WORLD_RANK": "3", "TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "4"}
    inherited |= {
        "SLURM_JOB_ID": "5",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "1",
        "SLURM_NTASKS": "9",
        "LOCAL_DISK": "kept",
    }
    command = script('(here / f"{rank}.json").write_text(json.dumps(dict(os.environ)))')
    assert run_local_ranks(2, command, inherited) == 0
    environments = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    zero, one = (identity_of(environment) for environment in environments)
    assert [(i.rank, i.world, i.local_rank, i.local_world, i.launcher) for i in (zero, one)] == [
        (0, 2, 0, 2, "local"),
        (1, 2, 1, 2, "local"),
    ]
    assert zero.master_port == one.master_port > 0
    assert zero.listening is not None
    assert one.listening is None
    assert environments[1]["LOCAL_DISK"] == "kept"
    assert "TORCHELASTIC_RUN_ID" not in environments[1]
    assert environments[1][LOCAL_LAUNCHER] == "-1"


def test_ranks_meet_on_the_port_that_was_kept_for_them(script, capfd):
    body = f"""
        sys.path.insert(0, {str(ROOT)!r})
        import torch, torch.distributed as dist
        from megatrain.base.device import Device
        from megatrain.cluster.identity import identity_of
        from megatrain.cluster.start import connected
        with connected(identity_of(os.environ), Device.of("cpu")):
            total = torch.tensor([rank + 1.0])
            dist.all_reduce(total)
        print(total.item(), dist.is_initialized())
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    assert run_local_ranks(2, script(body), environment) == 0, capfd.readouterr().err
    assert capfd.readouterr().out == "3.0 False\n"


def test_rank_0_sees_the_terminal(script, launcher):
    ours, theirs = pty.openpty()
    process = launcher(2, script("print(rank, sys.stdout.isatty(), sys.stdin.read())"), stdout=theirs, stderr=theirs)
    os.close(theirs)
    assert process.wait(PATIENCE) == 0
    assert os.read(ours, 1000).decode().split() == ["0", "True"]
    os.close(ours)


# ------------------------------------------------------------------------------------------------ signals

SAVES_ON_SIGNAL = """
    heard = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, frame: heard.append(n))
    say("ready")
    while not heard: time.sleep(0.01)
    time.sleep(0.3)  # "saving": a signal that arrives twice would be counted
    say(f"heard {[signal.Signals(n).name for n in heard]}")
    sys.exit(75)
"""


@pytest.mark.parametrize("sent", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGTERM, signal.SIGTERM], [signal.SIGHUP]])
def test_every_rank_hears_a_signal_once_and_ends_in_its_own_time(script, launcher, sent):
    process = launcher(2, script(SAVES_ON_SIGNAL))
    assert lines(process, 2) == ["[rank 0] ready", "[rank 1] ready"]
    for number in sent:
        process.send_signal(number)
    name = "SIGINT" if sent == [signal.SIGINT] else "SIGTERM"
    assert lines(process, 2) == [f"[rank 0] heard ['{name}']", f"[rank 1] heard ['{name}']"]
    assert process.wait(PATIENCE) == 75


def test_ctrl_c_in_the_terminal_reaches_each_rank_once(script, launcher):
    """The terminal signals its whole foreground process group; ranks are not in it, so they hear it from us alone."""
    process = launcher(2, script(SAVES_ON_SIGNAL), start_new_session=True)
    lines(process, 2)
    os.killpg(process.pid, signal.SIGINT)
    assert lines(process, 2) == ["[rank 0] heard ['SIGINT']", "[rank 1] heard ['SIGINT']"]
    assert process.wait(PATIENCE) == 75


STUBBORN = """
    signal.signal(signal.SIGINT, lambda n, frame: say("not yet"))
    say(os.getpid())
    while True: time.sleep(600)
"""


def test_a_second_ctrl_c_ends_at_once(script, launcher):
    process = launcher(2, script(STUBBORN))
    pids = [int(line.split()[-1]) for line in lines(process, 2)]
    process.send_signal(signal.SIGINT)
    assert lines(process, 2) == ["[rank 0] not yet", "[rank 1] not yet"]
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130
    for pid in pids:
        wait_until_gone(pid)


def test_no_rank_outlives_a_launcher_that_is_killed(script, launcher):
    process = launcher(2, script(STUBBORN))
    pids = [int(line.split()[-1]) for line in lines(process, 2)]
    process.kill()
    for pid in pids:
        wait_until_gone(pid)
