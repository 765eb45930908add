"""What must fit between the parts of a run file, asked before anything is started. All problems are shown at once."""

from pathlib import Path

import torch
from torch import nn

from megatrain.base.errors import ConfigError, DataError
from megatrain.base.files import sha256_of
from megatrain.data.manifest import Manifest, TokenizerEntry
from megatrain.data.stream import Order, Stream
from megatrain.engine.layout import layout_problems
from megatrain.models.recompute import unmatched
from megatrain.nn.precision.select import selection_problems
from megatrain.nn.precision.transformer_engine import shape_problems
from megatrain.parallel.tensor import TensorParallel
from megatrain.train.config import Run


def refuse(run: Run, world: int) -> tuple[Manifest, ...]:
    """The manifests of the run's data sets, if all of the run fits together on `world` ranks.

    Raises:
        ConfigError: with everything that does not fit.
        DataError: a data set is missing or damaged.
    """
    problems = problems_of(run, world)
    try:
        stream = Stream(Order(run.data, run.seed, run.train.global_batch))
    except (DataError, ConfigError) as error:
        if problems:
            raise ConfigError([*problems, *str(error).splitlines()]) from None
        raise
    problems += data_problems(run, stream.tokenizer)
    if problems:
        raise ConfigError(problems)
    return stream.manifests


def problems_of(run: Run, world: int) -> list[str]:
    """What is wrong between the parts, without looking at the data."""
    found = layout_problems(
        run.layout,
        world,
        run.train.global_batch,
        seq_len=run.data.seq_len,
        precision=run.precision,
        n_layers=run.model.n_layers,
        tied=run.model.tie_embeddings,
    )
    found += run.model.layout_problems(run.layout.tp, run.layout.cp, run.layout.cp_kind)
    found += unmatched(run.model.n_layers, run.layout.recompute)
    found += run.schedule.unsupported_reasons(run.total_steps)
    found += retention_problems(run)
    if not found:
        dp = run.layout.mesh(world).axis("dp").size
        found += run.data.all_problems(run.train.global_batch, dp)
        found += named_problems(run, world)
    return found


def named_problems(run: Run, world: int) -> list[str]:
    """What patterns miss and which layers cannot be as asked, seen on one rank's part of a model without memory."""
    tp = TensorParallel(run.layout.mesh(world).axis("tp"))
    with torch.device("meta"):
        model = run.model.build(n_valid=run.model.vocab_size or tp.size, seq_len=run.data.seq_len, tp=tp)
    return run.optimizer.unmatched(dict(model.named_parameters())) + precision_problems(run, model)


def precision_problems(run: Run, model: nn.Module) -> list[str]:
    """Why the chosen layers of this rank's part cannot multiply in eight bits."""
    eight_bits, fp8 = run.precision.eight_bits, run.precision.fp8
    if eight_bits is None:
        return []
    found = selection_problems(
        model, eight_bits, run.model.n_layers, "precision.int8" if fp8 is None else "precision.fp8"
    )
    if fp8 is not None and fp8.backend != "torch":
        found += shape_problems(run.data.seq_len // run.layout.cp)
    return found


def retention_problems(run: Run) -> list[str]:
    """Why the best commits cannot be told."""
    best, every, evaluated = run.checkpoint.keep.best, run.checkpoint.every or 0, run.train.eval_every
    if best and not (evaluated and every and every % evaluated == 0):
        return [
            f"checkpoint.keep.best={best} goes by the held-out loss at the steps that are saved, and "
            f"checkpoint.every={every or 'nothing'} is no multiple of train.eval_every={evaluated}: make it one"
        ]
    return []


def data_problems(run: Run, tokenizer: TokenizerEntry) -> list[str]:
    """What is wrong between the run and its data sets."""
    found = run.model.vocabulary_problems(tokenizer.vocab_size)
    if run.tokenizer is not None:
        path = Path(run.tokenizer)
        if not path.is_file():
            found.append(f"tokenizer is {run.tokenizer}, which is no file: give a tokenizer.json, or leave it out")
        elif sha256_of(path) != tokenizer.fingerprint:
            found.append(
                f"tokenizer {run.tokenizer} is not the one that the data was made with (sha256 {sha256_of(path)[:12]}, "
                f"the data's is {tokenizer.fingerprint[:12]}): leave it out, or build the data with it"
            )
    return found
