"""What a run is trained on: the `data` part of a run file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from megatrain.data.cache import Cache
from megatrain.data.corpus import Corpus
from megatrain.data.manifest import Manifest
from megatrain.data.objective import OBJECTIVE, Objective
from megatrain.data.objective.next_token import NextToken
from megatrain.data.packing import PACKING, Packing
from megatrain.data.packing.concat import Concat
from megatrain.data.store import problems as address_problems
from megatrain.data.store import redacted


@dataclass(frozen=True, kw_only=True)
class WeightedSource:
    """A data set of a mixture."""

    path: str
    """Folder of a data set, as `megatrain data build` makes it; or its address: https://..., s3://..., or a command
    that writes the file `{}` to its output, `pipe:ssh host cat /data/{}`."""
    weight: float = 1.0
    """Share of the tokens, relative to the other sources."""


def _is_weight(x: float) -> bool:
    return math.isfinite(x) and x > 0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """From a number of tokens on, what is said here holds; what is not said stays as `data` has it."""

    after: Annotated[int, "tokens"]
    """Tokens of global batches drawn before it, padding included."""
    seq_len: int | None = None
    """Tokens in a row, at most `data.seq_len`."""
    weights: tuple[float, ...] | None = None
    """Weight of each source, in order."""

    def problems_in(self, key: str, seq_len: int, n_sources: int) -> list[str]:
        found = []
        if self.seq_len is not None and not 1 <= self.seq_len <= seq_len:
            found.append(f"{key}.seq_len is {self.seq_len}: it must be between 1 and data.seq_len={seq_len}")
        if self.weights is not None and (len(self.weights) != n_sources or not all(map(_is_weight, self.weights))):
            found.append(
                f"{key}.weights is {list(self.weights)}: it must be a number above 0 for each source, of which there "
                f"are {n_sources}"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class Data:
    """The tokens of a run and their order. Batches depend on these values and the seed, and on nothing else."""

    sources: tuple[WeightedSource, ...]
    seq_len: int
    """Tokens in a row."""
    slots: int | None = None
    """Virtual readers that the stream is cut into; as many as there are rows in a global batch unless given. A run may
    be resumed on any number of data-parallel ranks that divides them."""
    curriculum: tuple[Stage, ...] = ()
    """Changes of the weights and the row length as training goes on, by the tokens drawn so far."""
    packing: Annotated[Packing, PACKING] = field(default_factory=Concat)
    objective: Annotated[Objective, OBJECTIVE] = field(default_factory=NextToken)
    """What is predicted of a document in training; held-out documents are always predicted token by token."""
    mask_documents: bool = True
    """Documents in a row do not see each other, and positions restart with each."""
    on_damage: Literal["refuse", "skip"] = "refuse"
    """What is done with a document whose bytes are not those that were written: stop, or leave it out of the loss and
    say so. Its place in the order stays, so every later batch is the same as without the damage."""
    workers: int = 1
    """Processes that read ahead for each rank; 0 reads in the training process itself."""

    cache: Cache = field(default_factory=Cache)
    allow_pipe: bool = False
    """Sources may be commands (`pipe:`), which are run on every machine of the run."""

    def corpora(self, split: str, seed: int, manifests: Sequence[Manifest] | None = None) -> list[Corpus]:
        """The sources, opened; `manifests` are theirs, where they were read before."""
        known: Sequence[Manifest | None] = manifests or [None] * len(self.sources)
        return [
            Corpus(source.path, split, seed, self.cache, self.allow_pipe, manifest)
            for source, manifest in zip(self.sources, known, strict=True)
        ]

    def problems(self) -> list[str]:
        found = []
        if not self.sources:
            found.append("data.sources is empty: name at least one data set, as {path: DIR}")
        paths = [source.path for source in self.sources]
        for path in sorted({p for p in paths if paths.count(p) > 1}):
            found.append(f"data.sources names {redacted(path)} more than once: name it once and raise its weight")
        for i, source in enumerate(self.sources):
            found += [f"data.sources.{i}.path: {p}" for p in address_problems(source.path, self.allow_pipe)]
            if not _is_weight(source.weight):
                found.append(
                    f"data.sources.{i}.weight is {source.weight}: it must be a number above 0; leave the source out "
                    "instead of giving it 0"
                )
        for i, stage in enumerate(self.curriculum):
            found += stage.problems_in(f"data.curriculum.{i}", self.seq_len, len(self.sources))
        if (begins := [stage.after for stage in self.curriculum]) != sorted(set(begins)):
            found.append(f"data.curriculum has stages after {begins} tokens: each must begin later than the one before")
        lengths = {self.seq_len, *(stage.seq_len for stage in self.curriculum if stage.seq_len)}
        found += self.packing.unsupported_reasons(lengths)
        for name, least in (("seq_len", 1), ("slots", 1), ("workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                found.append(f"data.{name} is {value}: it must be at least {least}")
        return found

    def stage_at(self, n_tokens: int) -> tuple[int, tuple[float, ...]]:
        """(tokens in a row, weights of the sources) when so many tokens were drawn."""
        seq_len, weights = self.seq_len, tuple(source.weight for source in self.sources)
        for stage in self.curriculum:
            if stage.after <= n_tokens:
                seq_len, weights = stage.seq_len or self.seq_len, stage.weights or tuple(s.weight for s in self.sources)
        return seq_len, weights

    def steps(self, n_tokens: int, global_batch: int) -> int:
        """Batches until at least `n_tokens` are drawn, whatever length their rows have."""
        drawn, steps = 0, 0
        ends = [stage.after for stage in self.curriculum if 0 < stage.after < n_tokens]
        for end in [*ends, n_tokens]:
            batch = global_batch * self.stage_at(drawn)[0]
            more = max(0, -(-(end - drawn) // batch))
            drawn, steps = drawn + more * batch, steps + more
        return steps

    def n_slots(self, global_batch: int) -> int:
        return self.slots or global_batch

    def all_problems(self, global_batch: int, dp: int) -> list[str]:
        """What is wrong with these values alone, of the choices among them, and with the batch and the ranks."""
        choices: list[list[str]] = [getattr(choice, "problems", list)() for choice in (self.packing, self.objective)]
        return self.problems() + [p for found in choices for p in found] + self.batch_problems(global_batch, dp)

    def batch_problems(self, global_batch: int, dp: int) -> list[str]:
        """What is wrong between these values, the global batch (in rows) and the data-parallel size."""
        found, slots = [], self.n_slots(global_batch)
        if global_batch % slots:
            found.append(
                f"train.global_batch={global_batch} is no multiple of data.slots={slots}: every slot gives a batch the "
                "same number of rows; change one of them"
            )
        if slots % dp:
            sizes = [d for d in range(1, slots + 1) if slots % d == 0]
            found.append(
                f"{slots} data slots cannot be shared by {dp} data-parallel ranks: use one of {sizes} ranks, or change "
                "data.slots (or train.global_batch)"
            )
        return found
