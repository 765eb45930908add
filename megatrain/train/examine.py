"""A step looked at after the fact: its documents, the gradient norm of each layer, extremes of activations."""

import math
from typing import Any

from megatrain.checkpoint.exchange import Exchange
from megatrain.data.manifest import Manifest
from megatrain.data.slots import merged
from megatrain.data.trace import documents_of
from megatrain.engine.api import Engine
from megatrain.engine.examine import extremes
from megatrain.nn.precision.select import block_of
from megatrain.train.config import Run
from megatrain.train.hook import Record
from megatrain.train.trainer import Pending


def examine(step: Pending, run: Run, engine: Engine, exchange: Exchange, manifests: tuple[Manifest, ...]) -> Record:
    """What is known of `step`. Every rank calls it.

    Gradient norms are those of the step itself. Activations are those of its batch under the weights as they are now,
    which are one or two steps older.

    Returns:
        `documents`, their ids in order; `gradient_norms` by block and by parameter outside of blocks;
        `activations`, the largest magnitude in each block's output.
    """
    cursors = step.cursors
    if cursors is not None and "own" in cursors:  # ranks that read raw text know the places of their own slots only
        cursors = merged(list({part["own"][0]: part for part in exchange.all(cursors)}.values()))
    blocks: Any = engine.parts.model.layers  # of this rank's stages
    largest = extremes({f"layers.{name}": block for name, block in blocks.items()}, engine.evaluate, step.batch)
    squares = {} if step.by_parameter is None else step.by_parameter.read()
    everyones = exchange.all((squares, largest))
    return {
        "documents": documents_of(
            run.data, seed=run.seed, global_batch=run.train.global_batch, cursors=cursors, manifests=manifests
        ),
        "gradient_norms": layer_norms([mine for mine, _ in everyones]),
        "activations": _largest([mine for _, mine in everyones]),
    }


def layer_norms(squares: list[dict[str, float]]) -> dict[str, float]:
    """Norms by block from every rank's sums of squares by parameter."""
    found: dict[str, float] = {}
    for of_rank in squares:
        for name, square in of_rank.items():
            block = block_of(name)
            key = name if block is None else f"layers.{block}"
            found[key] = found.get(key, 0.0) + square
    return {key: round(math.sqrt(square), 8) if square >= 0 else square for key, square in found.items()}


def _largest(everyones: list[dict[str, float]]) -> dict[str, float]:
    """The largest of all ranks; NaN where one has it."""
    found: dict[str, float] = {}
    for of_rank in everyones:
        for name, x in of_rank.items():
            before = found.get(name, x)
            found[name] = math.nan if math.isnan(before + x) else max(before, x)
    return {name: float(f"{x:.6g}") for name, x in found.items()}
