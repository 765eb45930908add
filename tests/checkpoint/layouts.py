"""Runs in every legal layout of a few ranks, and the story of a save: steps, the save, more steps."""

import itertools
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatrain.base.device import Device
from megatrain.checkpoint.checkpoints import Checkpoints
from megatrain.data.config import Data, WeightedSource
from megatrain.data.manifest import TokenizerEntry
from megatrain.engine.layout import Layout
from megatrain.models import MODEL
from megatrain.models.decoder import Decoder
from megatrain.nn.batch import Batch
from megatrain.optim.kinds.adamw import AdamW
from megatrain.optim.optimizer import Group
from megatrain.optim.schedule import SCHEDULE
from megatrain.train.build import build_engine, context_part
from megatrain.train.check import problems_of
from megatrain.train.config import Run, Train

ROWS, SEQ_LEN, VOCABULARY, SAVED_AT, GOES_ON = 12, 24, 31, 5, 5

# Groups that do not follow the order of parameters: a partition then has pieces of many of them.
OPTIMIZER = AdamW(
    lr=1e-2, eps=1e-4, clip=0.5,
    groups=(Group(match="*.to_out.*", lr_scale=0.5), Group(match="embedding.*", weight_decay=0.01)),
)  # fmt: skip

FROZEN = ("layers.1.feed_forward.*", "layers.*.attention_norm.*")


@MODEL.register("partly_frozen_decoder_of_tests")
@dataclass(frozen=True, kw_only=True)
class PartlyFrozen(Decoder):
    """Some of its weights are not trained."""

    def build(self, **facts: Any) -> Any:
        model = super().build(**facts)
        for name, p in model.named_parameters():
            p.requires_grad_(not any(fnmatchcase(name, pattern) for pattern in FROZEN))
        return model


@dataclass(frozen=True)
class Case:
    """A layout of so many ranks, and what is peculiar about the model."""

    layout: Layout
    model: str = "tied"

    @property
    def ranks(self) -> int:
        return self.layout.tp * self.layout.pp * self.layout.cp * (self.layout.dp or 1)

    @property
    def engine(self) -> str:
        return self.layout.engine

    def __str__(self) -> str:
        x = self.layout
        sizes = [f"{axis}{n}" for axis in ("pp", "dp", "cp", "tp") if (n := getattr(x, axis)) > 1]
        return "-".join([x.engine + str(x.zero), *sizes, self.model])

    @property
    def run(self) -> Run:
        build = PartlyFrozen if self.model == "frozen" else Decoder
        model = build(
            d_model=20, n_layers=4, n_heads=12, n_kv_heads=12, head_dim=2, d_ff=24, tie_embeddings=self.model == "tied"
        )
        return Run(
            name="run", model=model, data=Data(sources=(WeightedSource(path="nowhere"),), seq_len=SEQ_LEN),
            train=Train(global_batch=ROWS, steps=SAVED_AT + GOES_ON), schedule=SCHEDULE["cosine"](),
            optimizer=OPTIMIZER, layout=self.layout, seed=3,
        )  # fmt: skip

    @property
    def problems(self) -> list[str]:
        if self.model == "frozen" and self.engine == "deepspeed" and self.layout.zero:
            return ["it has no place for parameters that are not trained"]
        return problems_of(self.run, self.ranks)


def case(engine: str = "plain", zero: int = 0, model: str = "tied", dp: int = 1, pp: int = 1, **sizes: Any) -> Case:
    """Two micro-batches where the rows divide; a pipeline has as many as it has ranks, or more."""
    rows = ROWS // dp
    micro_batch = 3 if pp > 1 or rows % 2 else rows // 2
    layout = Layout(engine=engine, zero=zero, device="cpu", dp=dp, pp=pp, micro_batch=micro_batch, **sizes)
    return Case(layout, model)


ENGINES = [("plain", 0), *(("deepspeed", zero) for zero in range(4)), ("fsdp2", 2), ("fsdp2", 3)]
AXES = ("pp", "dp", "cp", "tp")


def every_case(model: str, most_ranks: int = 4) -> list[Case]:
    """Everything that is legal on so many ranks; one process comes first."""
    found = [case(model=model)]
    sizes = [
        dict(zip(AXES, counts, strict=True))
        for counts in itertools.product(range(1, most_ranks + 1), repeat=len(AXES))
        if 1 < counts[0] * counts[1] * counts[2] * counts[3] <= most_ranks
    ]
    cases = [case(engine, zero, model, **axes) for axes in sizes for engine, zero in ENGINES]
    sharded = [c for c in cases if c.engine == "plain" or c.layout.dp * c.layout.cp > 1]  # ZeRO of one is plain
    return found + [c for c in sharded if not c.problems]


def batch_of(step: int) -> Batch:
    """Rows of two documents each, some of whose targets do not count."""
    g = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, VOCABULARY, (ROWS, SEQ_LEN + 1), generator=g)
    tokens[:, 1::2] = tokens[:, 0:-1:2]  # something to learn
    border, column = torch.arange(ROWS)[:, None] + 4, torch.arange(SEQ_LEN).expand(ROWS, -1)
    second = column >= border
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=(torch.rand(ROWS, SEQ_LEN, generator=g) < 0.7).float(),
        positions=torch.where(second, column - border, column),
        documents=second.int(),
        most_documents=2,
        step=step,
    )


class Started:
    """One rank's engine of a case."""

    def __init__(self, case: Case):
        self.run = case.run
        self.mesh = case.layout.mesh(case.ranks)
        if dist.is_initialized():
            self.mesh = self.mesh.at(dist.get_rank()).connect()
        self.engine = build_engine(self.run, TokenizerEntry("0" * 64, VOCABULARY, 0), self.mesh, Device("cpu"))

    def losses(self, steps: range) -> list[float]:
        dp, found = self.mesh.axis("dp"), []
        for step in steps:
            rows = list(batch_of(step).split(ROWS // dp.size))[dp.rank]
            mine = context_part(rows, self.run.layout.context(self.mesh))
            found.append(float(self.engine.step(mine, 1e-2).loss))
        return found

    def checkpoints(self, folder: str) -> Checkpoints:
        return Checkpoints(folder, self.mesh.axis("world"))

    def save(self, checkpoints: Checkpoints) -> None:
        checkpoints.save(SAVED_AT, self.engine.slices(), {"engine": self.engine.scalars()}, {})


def train_and_save(cases: list[Case], folder: str) -> list[list[float]]:
    """Losses of all steps of each case; the state in the middle is saved under the case's name."""
    found = []
    for case in cases:
        here = Started(case)
        checkpoints = here.checkpoints(f"{folder}/{case}")
        losses = here.losses(range(SAVED_AT))
        here.save(checkpoints)
        found.append(losses + here.losses(range(SAVED_AT, SAVED_AT + GOES_ON)))
        checkpoints.close()
        here.engine.close()
    return found


def take_up(targets: list[tuple[Case, list[Case]]], folder: str) -> list[list[list[float]]]:
    """The losses that follow in each target on each of its sources; what is saved right after loading is kept."""
    found = []
    for target, sources in targets:
        here = Started(target)
        told = []
        for source in sources:
            theirs, ours = here.checkpoints(f"{folder}/{source}"), here.checkpoints(f"{folder}/{source}-in-{target}")
            commit = theirs.newest()
            assert commit is not None
            theirs.load(commit.reader(), here.engine)
            here.engine.load_scalars(commit.manifest.state["engine"])
            here.save(ours)
            told.append(here.losses(range(SAVED_AT, SAVED_AT + GOES_ON)))
            ours.close()
            theirs.close()
        found.append(told)
        here.engine.close()
    return found


def path_of(folder: Path, source: Case, target: Case | None = None) -> Path:
    return folder / (f"{source}" if target is None else f"{source}-in-{target}")
