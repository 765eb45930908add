"""Environments as launchers write them, and the identity each describes."""

# ruff: noqa: E501 (an environment is one long line)

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatrain.base.errors import ConfigError
from megatrain.cluster import nodelist
from megatrain.cluster.identity import Identity, identity_of
from megatrain.cluster.nodelist import hosts, tasks_per_node


def env(text: str) -> dict[str, str]:
    """ "A=1 B=2" as an environment."""
    return dict(word.split("=", 1) for word in text.split())


TORCHRUN = "TORCHELASTIC_RUN_ID=x GROUP_RANK=1 RANK=9 WORLD_SIZE=16 LOCAL_RANK=1 LOCAL_WORLD_SIZE=8 MASTER_ADDR=n1 MASTER_PORT=29400"
SRUN = (
    "SLURM_JOB_ID=1200 SLURM_STEP_ID=0 SLURM_NTASKS=16 SLURM_PROCID=9 SLURM_LOCALID=1 SLURM_NODEID=1 SLURM_NNODES=2 "
    "SLURM_TASKS_PER_NODE=8(x2) SLURM_JOB_NODELIST=gpu-[07-08] SLURM_STEP_RESV_PORTS=12000-12015"
)
MPIRUN = (
    "OMPI_COMM_WORLD_RANK=5 OMPI_COMM_WORLD_SIZE=8 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=4 "
    "MASTER_ADDR=a1 MASTER_PORT=6000"
)
HYDRA = "PMI_RANK=3 PMI_SIZE=4 MPI_LOCALRANKID=3 MPI_LOCALNRANKS=4"

KNOWN = {
    "alone": ("HOME=/root", Identity(0, 1, 0, 1, 0, "alone", "127.0.0.1", 0)),
    "torchrun, second node": (TORCHRUN, Identity(9, 16, 1, 8, 1, "torchrun", "n1", 29400)),
    "torchrun, one rank": (
        "TORCHELASTIC_RUN_ID=x GROUP_RANK=0 RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 MASTER_ADDR=n1 MASTER_PORT=5",
        Identity(0, 1, 0, 1, 0, "torchrun", "127.0.0.1", 0),
    ),
    "torchrun, one node of two ranks": (
        "TORCHELASTIC_RUN_ID=x GROUP_RANK=0 RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=5",
        Identity(1, 2, 1, 2, 0, "torchrun", "localhost", 5),
    ),
    "torchrun, over IPv6": (
        TORCHRUN.replace("=n1", "=[fd00::7]"),
        Identity(9, 16, 1, 8, 1, "torchrun", "fd00::7", 29400),
    ),
    "torchrun inside srun": (
        f"{TORCHRUN} {SRUN.replace('NTASKS=16', 'NTASKS=2').replace('PROCID=9', 'PROCID=1')}",
        Identity(9, 16, 1, 8, 1, "torchrun", "n1", 29400),
    ),
    "srun, second node": (SRUN, Identity(9, 16, 1, 8, 1, "srun", "gpu-07", 12000)),
    "srun, the step is smaller than the job": (
        f"{SRUN} SLURM_STEP_NODELIST=gpu-08 SLURM_STEP_TASKS_PER_NODE=2 "
        .replace("NTASKS=16", "NTASKS=2").replace("PROCID=9", "PROCID=1").replace("NODEID=1", "NODEID=0"),
        Identity(1, 2, 1, 2, 0, "srun", "127.0.0.1", 12000),
    ),
    "srun, uneven nodes": (
        SRUN.replace("8(x2)", "12,4").replace("PROCID=9", "PROCID=13"),
        Identity(13, 16, 1, 4, 1, "srun", "gpu-07", 12000),
    ),
    "srun, no reserved ports": (
        SRUN.replace("SLURM_STEP_RESV_PORTS=12000-12015", ""),
        Identity(9, 16, 1, 8, 1, "srun", "gpu-07", 16384 + 8400),
    ),
    "srun, no counts of tasks": (
        SRUN.replace("SLURM_TASKS_PER_NODE=8(x2)", ""),
        Identity(9, 16, 1, 8, 1, "srun", "gpu-07", 12000),
    ),
    "srun, the person names the meeting place": (
        f"{SRUN} MASTER_ADDR=ib-07 MASTER_PORT=777",
        Identity(9, 16, 1, 8, 1, "srun", "ib-07", 777),
    ),
    "srun, one task": (
        "SLURM_JOB_ID=5 SLURM_STEP_ID=2 SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_TASKS_PER_NODE=1 SLURM_JOB_NODELIST=n1",
        Identity(0, 1, 0, 1, 0, "srun", "127.0.0.1", 0),
    ),
    "srun with pmi2": (f"{SRUN} PMI_RANK=9 PMI_SIZE=16", Identity(9, 16, 1, 8, 1, "srun", "gpu-07", 12000)),
    "srun, RANK exported from SLURM_PROCID": (
        f"{SRUN} RANK=9 WORLD_SIZE=16 LOCAL_RANK=1 LOCAL_WORLD_SIZE=8 MASTER_ADDR=gpu-07",
        Identity(9, 16, 1, 8, 1, "environment", "gpu-07", 29500),
    ),
    "a Slurm job of one task, without srun": (
        "SLURM_JOB_ID=5 SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_JOB_NODELIST=n1",
        Identity(0, 1, 0, 1, 0, "alone", "127.0.0.1", 0),
    ),
    "mpirun on two hosts": (MPIRUN, Identity(5, 8, 1, 4, 1, "mpirun", "a1", 6000)),
    "mpirun on one host": (
        "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2",
        Identity(1, 2, 1, 2, 0, "mpirun", "127.0.0.1", 29500),
    ),
    "mpirun inside a Slurm step of daemons": (
        f"{MPIRUN} SLURM_JOB_ID=5 SLURM_STEP_ID=0 SLURM_PROCID=1 SLURM_NTASKS=2 SLURM_LOCALID=0",
        Identity(5, 8, 1, 4, 1, "mpirun", "a1", 6000),
    ),
    "mpiexec of MPICH": (HYDRA, Identity(3, 4, 3, 4, 0, "mpiexec", "127.0.0.1", 29500)),
    "Kubernetes: one rank a pod": (
        "RANK=2 WORLD_SIZE=4 MASTER_ADDR=job-master-0 MASTER_PORT=23456",
        Identity(2, 4, 0, 1, 2, "environment", "job-master-0", 23456),
    ),
    "DeepSpeed's launcher": (
        "RANK=3 WORLD_SIZE=8 LOCAL_RANK=3 LOCAL_SIZE=4 MASTER_ADDR=w1 MASTER_PORT=29500 CROSS_RANK=0",
        Identity(3, 8, 3, 4, 0, "environment", "w1", 29500),
    ),
    "one rank by hand": ("RANK=0 WORLD_SIZE=1", Identity(0, 1, 0, 1, 0, "environment", "127.0.0.1", 0)),
    "empty values count as unset": ("RANK= WORLD_SIZE= SLURM_PROCID=", Identity(0, 1, 0, 1, 0, "alone", "127.0.0.1", 0)),
    "our local launcher, rank 0": (
        "MEGATRAIN_LOCAL_LAUNCHER=5 RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=4001",
        Identity(0, 2, 0, 2, 0, "local", "127.0.0.1", 4001, listening=5),
    ),
    "our local launcher inside a Slurm job": (
        "MEGATRAIN_LOCAL_LAUNCHER=-1 RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=4001 "
        "SLURM_JOB_ID=5 SLURM_NTASKS=8 SLURM_PROCID=0 SLURM_STEP_ID=0",
        Identity(1, 2, 1, 2, 0, "local", "127.0.0.1", 4001),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), KNOWN.values(), ids=KNOWN)
def test_a_launchers_environment_names_this_rank(text, expected):
    assert identity_of(env(text)) == expected


REFUSED = {
    "half an environment": ("RANK=3", "RANK is set and WORLD_SIZE is not: set all of them"),
    "the other half": ("WORLD_SIZE=3 MASTER_ADDR=a", "WORLD_SIZE is set and RANK is not"),
    "nobody to meet": ("RANK=0 WORLD_SIZE=2", "MASTER_ADDR is not: set all of them"),
    "no count of local ranks": ("RANK=1 WORLD_SIZE=4 LOCAL_RANK=1 MASTER_ADDR=a", "LOCAL_WORLD_SIZE is not: set it to"),
    "rank outside the world": ("RANK=4 WORLD_SIZE=4 MASTER_ADDR=a", "rank 4 of 4 cannot be"),
    "local rank outside the node": (
        "RANK=1 WORLD_SIZE=4 LOCAL_RANK=2 LOCAL_WORLD_SIZE=2 MASTER_ADDR=a",
        "local rank 2 of 2 in a world of 4 cannot be",
    ),
    "more on the node than in the world": (
        "RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=8 MASTER_ADDR=a",
        "local rank 0 of 8 in a world of 2 cannot be",
    ),
    "no number": ("RANK=one WORLD_SIZE=2 MASTER_ADDR=a", "RANK=one is not a whole number from 0"),
    "negative": ("RANK=-1 WORLD_SIZE=2 MASTER_ADDR=a", "RANK=-1 is not a whole number from 0"),
    "port too large": ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=99999", "MASTER_PORT=99999 is no port"),
    "port 0 for two": ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=0", "MASTER_PORT=0 is no port"),
    "several nodes meet at localhost": (
        TORCHRUN.replace("=n1", "=localhost"),
        "MASTER_ADDR=localhost but the 16 ranks are on several nodes (8 on this one)",
    ),
    "a name that resolves to itself": (f"{SRUN} MASTER_ADDR=127.0.1.1", "give the name of rank 0's node"),
    "RANK exported in the shell before srun": (
        f"{SRUN} RANK=0 WORLD_SIZE=1",
        "RANK=0 of WORLD_SIZE=1 contradicts SLURM_PROCID=9 of SLURM_NTASKS=16: unset RANK and WORLD_SIZE",
    ),
    "RANK is another than Slurm's": (
        f"{SRUN} RANK=2 WORLD_SIZE=16 MASTER_ADDR=a",
        "contradicts SLURM_PROCID=9 of SLURM_NTASKS=16",
    ),
    "RANK is another than mpirun's": (f"{MPIRUN} RANK=0 WORLD_SIZE=8", "contradicts OMPI_COMM_WORLD_RANK=5"),
    "a Slurm job that forgot srun": (
        "SLURM_JOB_ID=5 SLURM_NTASKS=8 SLURM_PROCID=0 SLURM_JOB_NODELIST=n1",
        "this Slurm job has 8 tasks but this process was not started by srun",
    ),
    "srun, parts missing": ("SLURM_STEP_ID=0 SLURM_PROCID=1", "SLURM_PROCID is set and SLURM_NTASKS, SLURM_LOCALID are not"),
    "srun, no list of nodes": (
        SRUN.replace("SLURM_JOB_NODELIST=gpu-[07-08]", ""),
        "SLURM_JOB_NODELIST and MASTER_ADDR are not set",
    ),
    "srun, a list of nodes that is none": (SRUN.replace("gpu-[07-08]", "gpu-[8-7]"), "'gpu-[8-7]' is not a Slurm node list"),
    "srun, counts of another job": (SRUN.replace("8(x2)", "4"), "do not fit the tasks per node '4'"),
    "srun, counts that are none": (SRUN.replace("8(x2)", "8x2"), "'8x2' is not a list of tasks per node"),
    "mpirun on two hosts without a meeting place": (
        MPIRUN.replace("MASTER_ADDR=a1", ""),
        "mpirun started 8 ranks on several nodes and MASTER_ADDR is not set",
    ),
    "mpirun, parts missing": ("OMPI_COMM_WORLD_RANK=5 OMPI_COMM_WORLD_SIZE=8", "OMPI_COMM_WORLD_LOCAL_RANK, OMPI_COMM_WORLD_LOCAL_SIZE are not"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_an_environment_that_cannot_be_is_refused_in_one_sentence(text, message):
    with pytest.raises(ConfigError) as caught:
        identity_of(env(text))
    assert message in str(caught.value)
    assert len(caught.value.problems) == 1


def test_the_real_environment_is_not_read(monkeypatch):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "9")
    assert identity_of({}).launcher == "alone"


# ------------------------------------------------------------------------------------------------ Slurm's short forms


def test_the_examples_in_docstrings_hold():
    assert doctest.testmod(nodelist).failed == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n1", ["n1"]),
        ("n1,n2", ["n1", "n2"]),
        ("n[1]", ["n1"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("gpu-a-[1,3-4]-ib", ["gpu-a-1-ib", "gpu-a-3-ib", "gpu-a-4-ib"]),
        ("x.example.org,y[1-2].example.org", ["x.example.org", "y1.example.org", "y2.example.org"]),
    ],
)
def test_node_lists_are_read(text, expected):
    assert hosts(text) == expected


@pytest.mark.parametrize("text", ["", ",", "n[1", "n1]", "n[a]", "n[]", "n[2-1]", "n[1-999999999]", "n[1,]", "[[1]]"])
def test_what_is_no_node_list_is_refused(text):
    with pytest.raises(ConfigError, match="is not a Slurm node list"):
        hosts(text)


@given(st.lists(st.tuples(st.integers(1, 99), st.integers(1, 5)), min_size=1))
def test_task_counts_are_read_back(pairs):
    text = ",".join(f"{tasks}(x{n})" if n > 1 else str(tasks) for tasks, n in pairs)
    assert tasks_per_node(text) == [tasks for tasks, n in pairs for _ in range(n)]
