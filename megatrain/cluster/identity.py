"""Which rank is this process, and where does it meet the others? Read from the environment that its launcher wrote.

Asked in this order, since a launcher may run inside another (torchrun or mpirun inside a Slurm job):
our own local launcher, torchrun, RANK and WORLD_SIZE by hand, Open MPI, srun, MPICH or Intel MPI; else it is alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatrain.base.errors import ConfigError
from megatrain.cluster.nodelist import hosts, tasks_per_node

LOCAL_LAUNCHER = "MEGATRAIN_LOCAL_LAUNCHER"
"""Set by `local_ranks`: the file descriptor on which rank 0 listens, -1 for the other ranks."""

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 29500
"""What torchrun and DeepSpeed take where nobody says."""

OPEN_MPI = tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
HYDRA = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
"""What the launcher of MPICH and Intel MPI sets."""


@dataclass(frozen=True)
class Identity:
    """One process among all that train together."""

    rank: int
    world: int
    local_rank: int
    """Its place among the ranks of its node: the index of its card."""
    local_world: int
    """Ranks on its node."""
    node: int
    """Its node's place among the nodes."""
    launcher: str
    """alone, local, torchrun, environment, mpirun, srun or mpiexec."""
    master_addr: str
    """Where rank 0 listens."""
    master_port: int
    """0 where no port is needed, since the process is alone."""
    listening: int | None = None
    """A file descriptor that listens on that port already, inherited by rank 0 of the local launcher."""

    @property
    def alone(self) -> bool:
        return self.world == 1


def identity_of(environment: Mapping[str, str]) -> Identity:
    """The identity that an environment describes; it reads nothing else.

    Raises:
        ConfigError: parts are missing, are no numbers, or contradict each other.
    """
    env = _Environment(environment)
    if LOCAL_LAUNCHER in env:
        found = _by_hand(env, "local")
    elif "TORCHELASTIC_RUN_ID" in env:
        found = _by_hand(env, "torchrun")
    elif "RANK" in env or "WORLD_SIZE" in env:
        found = _by_hand(env, "environment")
    elif "OMPI_COMM_WORLD_RANK" in env:
        found = _mpi(env, "mpirun", *OPEN_MPI)
    elif "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        found = _srun(env)
    elif "PMI_RANK" in env:
        found = _mpi(env, "mpiexec", *HYDRA)
    else:
        _refuse_a_job_without_srun(env)
        found = Identity(0, 1, 0, 1, 0, "alone", LOOPBACK, 0)
    return _checked(found)


# ------------------------------------------------------------------------------------------------ the launchers


def _by_hand(env: "_Environment", launcher: str) -> Identity:
    """RANK and WORLD_SIZE, as torchrun, our local launcher, DeepSpeed's, Kubernetes' operator and people set them."""
    env.need("RANK", "WORLD_SIZE")
    rank, world = env.number("RANK"), env.number("WORLD_SIZE")
    if launcher == "environment":
        _refuse_another_rank(env, rank, world)
    if world > 1:
        env.need("MASTER_ADDR")
    if "LOCAL_RANK" not in env:
        local_rank, local_world = 0, 1  # one rank a node, as on Kubernetes
    else:
        local_rank = env.number("LOCAL_RANK")
        count = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in env), None)
        if count is None and world > 1:
            raise ConfigError(
                "LOCAL_RANK is set and LOCAL_WORLD_SIZE is not: set it to the number of ranks on this node"
            )
        local_world = env.number(count) if count else 1
    node = env.number("GROUP_RANK") if "GROUP_RANK" in env else rank // max(1, local_world)
    listening = env.number(LOCAL_LAUNCHER, least=-1) if launcher == "local" else -1
    return Identity(
        rank, world, local_rank, local_world, node, launcher,
        *_meeting_place(env, world, default_addr=LOOPBACK, default_port=DEFAULT_PORT),
        listening if listening >= 0 else None,
    )  # fmt: skip


def _srun(env: "_Environment") -> Identity:
    env.need("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    rank, world, node = env.number("SLURM_PROCID"), env.number("SLURM_NTASKS"), 0
    if "SLURM_NODEID" in env:
        node = env.number("SLURM_NODEID")
    counts = env.first("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    if counts is not None:
        each = tasks_per_node(counts)
        if node >= len(each) or sum(each) != world:
            raise ConfigError(
                f"SLURM_NTASKS={world} and SLURM_NODEID={node} do not fit the tasks per node {counts!r}: "
                "these variables come from different jobs, start from a fresh srun"
            )
        local_world = each[node]
    else:
        n_nodes = env.number(env.first_name("SLURM_STEP_NUM_NODES", "SLURM_NNODES") or "SLURM_NNODES", default=1)
        local_world = -(-world // max(1, n_nodes))
    nodes = env.first("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    if nodes is None and world > 1 and "MASTER_ADDR" not in env:
        raise ConfigError("SLURM_JOB_NODELIST and MASTER_ADDR are not set: give MASTER_ADDR, the host of rank 0")
    addr = hosts(nodes)[0] if nodes is not None and local_world < world else LOOPBACK
    return Identity(
        rank, world, env.number("SLURM_LOCALID"), local_world, node, "srun",
        *_meeting_place(env, world, default_addr=addr, default_port=_slurm_port(env)),
    )  # fmt: skip


def _slurm_port(env: "_Environment") -> int:
    """A port that Slurm reserved for the step; else one that the job's number picks, below the ephemeral ones."""
    if reserved := env.first("SLURM_STEP_RESV_PORTS"):
        first = reserved.split(",")[0].split("-")[0]
        if first.isdecimal():
            return int(first)
    job = env.number("SLURM_JOB_ID", default=0) * 7 + env.number("SLURM_STEP_ID", default=0)
    return 16384 + job % 16000


def _mpi(env: "_Environment", launcher: str, rank: str, world: str, local_rank: str, local_world: str) -> Identity:
    env.need(rank, world, local_rank, local_world)
    n, each = env.number(world), env.number(local_world)
    if each < n and "MASTER_ADDR" not in env:
        raise ConfigError(
            f"{launcher} started {n} ranks on several nodes and MASTER_ADDR is not set: give every rank the host of "
            f"rank 0 (for Open MPI: mpirun -x MASTER_ADDR=HOST -x MASTER_PORT={DEFAULT_PORT} ...)"
        )
    return Identity(
        env.number(rank), n, env.number(local_rank), each, env.number(rank) // max(1, each), launcher,
        *_meeting_place(env, n, default_addr=LOOPBACK, default_port=DEFAULT_PORT),
    )  # fmt: skip


def _meeting_place(env: "_Environment", world: int, *, default_addr: str, default_port: int) -> tuple[str, int]:
    if world == 1:
        return LOOPBACK, 0
    addr = env.first("MASTER_ADDR") or default_addr
    return addr.strip("[]"), env.number("MASTER_PORT", default=default_port)  # an IPv6 address may stand in brackets


# ------------------------------------------------------------------------------------------------ what cannot be


def _refuse_another_rank(env: "_Environment", rank: int, world: int) -> None:
    """RANK set by hand inside srun or mpirun must agree with them, or ranks would train apart or meet twice."""
    pairs = [("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")]
    if "SLURM_STEP_ID" in env:
        pairs.append(("SLURM_PROCID", "SLURM_NTASKS"))
    for their_rank, their_world in pairs:
        if their_rank not in env or their_world not in env:
            continue
        r, n = env.number(their_rank), env.number(their_world)
        # Larger worlds are fine: a launcher of its own runs on each node. One rank a node cannot be a smaller world.
        if world < n or (world == n and rank != r):
            raise ConfigError(
                f"RANK={rank} of WORLD_SIZE={world} contradicts {their_rank}={r} of {their_world}={n}: "
                "unset RANK and WORLD_SIZE (were they exported in your shell?) or start without the other launcher"
            )


def _refuse_a_job_without_srun(env: "_Environment") -> None:
    tasks = env.number("SLURM_NTASKS", default=1)
    if "SLURM_JOB_ID" in env and tasks > 1:
        raise ConfigError(
            f"this Slurm job has {tasks} tasks but this process was not started by srun, so it would train alone: "
            "put srun before the command, or use --nproc to start ranks on this node"
        )


def _checked(found: Identity) -> Identity:
    """`found`, unless its numbers cannot be."""
    problems = []
    if found.world < 1 or not 0 <= found.rank < found.world:
        problems.append(f"rank {found.rank} of {found.world} cannot be: ranks go from 0 to the world's size less 1")
    elif not 0 <= found.local_rank < found.local_world <= found.world:
        problems.append(
            f"local rank {found.local_rank} of {found.local_world} in a world of {found.world} cannot be: "
            "local ranks go from 0 to the ranks on the node less 1"
        )
    if not 0 <= found.master_port < 2**16 or (not found.alone and found.master_port == 0):
        problems.append(f"MASTER_PORT={found.master_port} is no port: give a number from 1 to 65535")
    if found.local_world < found.world and _is_loopback(found.master_addr):
        problems.append(
            f"MASTER_ADDR={found.master_addr} but the {found.world} ranks are on several nodes "
            f"({found.local_world} on this one): give the name of rank 0's node"
        )
    if problems:
        raise ConfigError([f"{problem} (started by {found.launcher})" for problem in problems])
    return found


def _is_loopback(addr: str) -> bool:
    return addr in ("localhost", "::1") or addr.startswith("127.")


class _Environment:
    """An environment whose values are asked for by name, with errors that name them. Empty values count as unset."""

    def __init__(self, values: Mapping[str, str]):
        self.values = {name: value.strip() for name, value in values.items() if value.strip()}

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def need(self, *names: str) -> None:
        missing = [name for name in names if name not in self]
        if missing:
            given = [name for name in names if name in self]
            because = f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} set and " if given else ""
            raise ConfigError(
                f"{because}{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not: "
                "set all of them, or none and start with torchrun, srun or --nproc"
            )

    def first_name(self, *names: str) -> str | None:
        return next((name for name in names if name in self), None)

    def first(self, *names: str) -> str | None:
        name = self.first_name(*names)
        return self.values[name] if name else None

    def number(self, name: str, *, default: int | None = None, least: int = 0) -> int:
        if name not in self and default is not None:
            return default
        text = self.values.get(name, "")
        try:
            if (value := int(text)) >= least:
                return value
        except ValueError:
            pass
        raise ConfigError(f"{name}={text} is not a whole number from {least}: the launcher's environment is damaged")
