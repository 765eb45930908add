"""What all ranks must have alike: configuration, code and versions at the start, copies of weights all the time."""

import hashlib
import json
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from megatrain.base.errors import ConfigError, RunError
from megatrain.checkpoint.exchange import Exchange
from megatrain.config.build import flat
from megatrain.engine.api import Engine
from megatrain.parallel.shard import Slice
from megatrain.train.hook import Hook, Record


def refuse_disagreement(facts: dict[str, Any], exchange: Exchange) -> None:
    """Every rank calls it with what it believes; ranks that differ would train different models together.

    Raises:
        ConfigError: on every rank, with each key that differs, what rank 0 has, and what others have.
    """
    mine = {key: json.dumps(value, sort_keys=True) for key, value in flat(facts).items()}
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
    if len(set(exchange.all(digest))) == 1:
        return
    first, *others = exchange.all(mine)
    problems = []
    for key in sorted({key for facts_of_rank in (first, *others) for key in facts_of_rank}):
        apart = {rank: other.get(key) for rank, other in enumerate(others, 1) if other.get(key) != first.get(key)}
        if apart:
            rank, value = next(iter(apart.items()))
            problems.append(
                f"ranks do not agree on {key}: rank 0 has {first.get(key)}, rank {rank} has {value}"
                f"{f' ({len(apart)} ranks differ)' if len(apart) > 1 else ''}: start all of them from the same files"
            )
    raise ConfigError(problems)


def drifted(engine: Engine, exchange: Exchange) -> list[str]:
    """Weights of which ranks hold copies that are no longer the same bits, each with its ranks; every rank calls it.

    What only one rank holds (a ZeRO partition) has no copy to compare.
    """
    mine = {_label(s): checksum(s.values) for s in engine.slices() if s.state == "weights"}
    holders: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, checksums in enumerate(exchange.all(mine)):
        for label, value in checksums.items():
            holders[label][value].append(rank)
    return [
        f"{label}: ranks {' and ranks '.join(str(ranks) for ranks in values.values())} hold different values"
        for label, values in sorted(holders.items())
        if len(values) > 1
    ]


def checksum(x: Tensor) -> int:
    """A sum over the bits of x that any single changed value changes, and that tells orders apart."""
    bits = x.detach().reshape(-1).contiguous().view(torch.uint8).view(-1, x.element_size()).long()
    word = (bits << (8 * torch.arange(x.element_size(), device=x.device))).sum(1)
    return int((word * (2 * torch.arange(len(word), device=x.device) + 1)).sum())  # odd factors, wrapping in int64


def _label(s: Slice) -> str:
    whole = (s.box.n_rows, s.box.n_columns) == s.matrix
    return s.name if whole else f"{s.name}[{s.box.row}+{s.box.n_rows}, {s.box.column}+{s.box.n_columns}]"


class Drift(Hook):
    """Every so many steps, stop the run if copies have drifted apart: from then on it would be no one model."""

    def __init__(self, every: int, engine: Engine, exchange: Exchange):
        self.every, self.engine, self.exchange = every, engine, exchange

    def due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def after_step(self, record: Record) -> None:
        if self.due(record["step"]):
            refuse_drift(self.engine, self.exchange, record["step"])


def refuse_drift(engine: Engine, exchange: Exchange, step: int) -> None:
    """Raise RunError on every rank if copies of weights differ."""
    if found := drifted(engine, exchange):
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise RunError(
            f"after step {step} copies of the weights are no longer equal ({'; '.join(found[:3])}{more}): a rank "
            "computes wrongly or its memory is damaged; resume from a checkpoint before it without that node"
        )
