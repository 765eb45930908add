"""Runs of one process and of many, side by side: what the tests of this folder share.

A start of ranks is the dear part, so the ranks of one start take many jobs one after another.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatrain.engine.layout import Layout, resolve_engine
from megatrain.train.config import read_run
from megatrain.train.verify import Verdict, compare, layout_of, prepared, take_steps
from tests.ranks import run
from tests.train.small import write_run

ALONE = "engine=plain"

Mutation = Callable[[pytest.MonkeyPatch], None]


def nothing(patch: pytest.MonkeyPatch) -> None:
    pass


@dataclass(frozen=True)
class Job:
    """One side: the first steps of a run file under a layout, with the code changed by `mutate`."""

    path: str
    layout: str
    folder: str
    steps: int
    mutate: Mutation = nothing

    @property
    def chosen(self) -> tuple[Layout, int]:
        return layout_of(self.layout, read_run(self.path).run.layout)


def take(jobs: list[Job]) -> None:
    """What each rank of a start does."""
    for job in jobs:
        chosen, world = job.chosen
        mesh = chosen.mesh(world)
        if world > 1:
            mesh = mesh.at(dist.get_rank()).connect()
        with pytest.MonkeyPatch.context() as patch:
            job.mutate(patch)
            take_steps(prepared(read_run(job.path).run, chosen), mesh, job.steps, Path(job.folder))
        for group in mesh.groups.values():
            dist.destroy_process_group(group)


def take_all(jobs: list[Job], timeout: float = 600) -> None:
    """Take every job on as many ranks as it needs: those of one size in one start, DeepSpeed's each in its own."""
    starts: dict[Any, list[Job]] = {}
    for job in jobs:
        chosen, world = job.chosen
        alone = job.folder if resolve_engine(chosen, world).engine == "deepspeed" else ""
        starts.setdefault((world, alone), []).append(job)
    for (world, _), together in starts.items():
        if world == 1:
            take(together)
        else:
            run(take, world, together, timeout=timeout)


def compared(one: Path, job: Job) -> Verdict:
    return compare(one, Path(job.folder), job.layout, job.steps, job.chosen[0])


def small_run(folder: Path, data: Path, **changes: Any) -> str:
    """A run with dropout, packed documents, grouped heads, two micro-batches a rank and an active clip."""
    folder.mkdir(parents=True, exist_ok=True)
    base = {"model__dropout": 0.1, "model__n_heads": 8, "model__n_kv_heads": 2, "train__steps": 20}
    return str(write_run(folder, data, **(base | changes)))
