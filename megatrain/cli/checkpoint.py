"""`megatrain checkpoint ...`: look at checkpoints, compare them, check their bytes, and put them together."""

import json
from typing import Any

import click
from rich.console import Console
from rich.table import Table


@click.group(short_help="Look at a checkpoint, compare two, check one, average several.")
def command() -> None:
    """What is in a checkpoint. CHECKPOINT is a step's folder, or a run's, whose newest one is meant.

    \b
    megatrain checkpoint inspect runs/tiny
    megatrain checkpoint diff runs/tiny/checkpoints/step-00000100 runs/tiny/checkpoints/step-00000200
    megatrain checkpoint average runs/tiny/checkpoints/step-* --out soup
    """


as_json = click.option("--json", "as_json", is_flag=True, help="JSON instead of a table.")


@command.command(short_help="Names, shapes and norms.")
@click.argument("checkpoint")
@click.option("--state", "only", help="Only this kind of tensor: weights, exp_avg, ...")
@click.option("--norms/--no-norms", default=True, help="Read the values for norms; one tensor is in memory at a time.")
@click.option("--model", is_flag=True, help="Only the `model` section that its weights are of, for a run file.")
@as_json
def inspect(checkpoint: str, only: str | None, norms: bool, model: bool, as_json: bool) -> None:
    """Show every tensor of CHECKPOINT, and where the run stood.

    \b
    megatrain checkpoint inspect runs/tiny --state weights
    megatrain checkpoint inspect llama --model > llama.yaml
    megatrain checkpoint inspect runs/tiny --no-norms --json
    """
    from megatrain.base.errors import CheckpointError, did_you_mean
    from megatrain.checkpoint.compare import summaries
    from megatrain.checkpoint.model import config_of
    from megatrain.checkpoint.read import find
    from megatrain.config.source import dump

    commit = find(checkpoint, check=norms and not model)
    if model:
        section = {"model": config_of(commit)["model"]}
        click.echo(json.dumps(section, indent=1) if as_json else dump(section), nl=as_json)
        return
    states = sorted({state for state, _ in commit.manifest.tensors})
    if only is not None and only not in states:
        raise CheckpointError(f"--state {only}: {did_you_mean(only, states)}")
    rows = [row for row in summaries(commit.reader(), norms) if only in (None, row.state)]
    origin = commit.manifest.facts.get("origin", {})
    if as_json:
        about = {"folder": commit.storage.describe(commit.folder), "step": commit.step, "digest": commit.digest}
        click.echo(json.dumps(about | {"origin": origin, "tensors": [vars(row) for row in rows]}, indent=1))
        return
    table = Table("state", "name", "shape", "dtype", "slices", "norm", "largest", "not finite", box=None)
    for row in rows:
        figures = [_figure(row.norm), _figure(row.largest), _figure(row.not_finite or None)]
        table.add_row(row.state, row.name, str(list(row.shape)), row.dtype, str(row.slices), *figures)
    names = max((len(row.name) for row in rows), default=0)
    console = Console(soft_wrap=True, width=100 + names)  # names are for copying: never cut
    console.print(table)
    total = sum(file.bytes for file in commit.manifest.files.values())
    console.print(
        f"{commit.storage.describe(commit.folder)}: step {commit.step}, {len(rows)} tensors, {total} bytes in "
        f"{len(commit.manifest.files)} files, written by {origin.get('ranks', '?')} ranks",
        highlight=False,
    )


@command.command(short_help="What differs between two.")
@click.argument("a")
@click.argument("b")
@as_json
def diff(a: str, b: str, as_json: bool) -> None:
    """Show what is not the same in A and B: config, state, and every tensor whose bits differ. Exit 1 if anything is.

    \b
    megatrain checkpoint diff runs/a runs/b
    """
    from megatrain.checkpoint.compare import diff as compare
    from megatrain.checkpoint.read import find

    found = list(compare(find(a).reader(), find(b).reader()))
    if as_json:
        click.echo(json.dumps([vars(difference) for difference in found], indent=1))
    else:
        for difference in found:
            click.echo(f"{difference.what}: {difference.how}")
        click.echo(f"{len(found)} differences" if found else "the same")
    raise click.exceptions.Exit(1 if found else 0)


@command.command(short_help="Check every byte against its digest.")
@click.argument("checkpoint")
@as_json
def verify(checkpoint: str, as_json: bool) -> None:
    """Check CHECKPOINT's files against the digests taken when it was written; names what is damaged, and exits 1.

    \b
    megatrain checkpoint verify runs/tiny
    """
    from megatrain.checkpoint.read import find

    commit = find(checkpoint)
    files, where = commit.manifest.files.values(), commit.storage.describe(commit.folder)
    answer = {"folder": where, "step": commit.step, "files": len(files), "bytes": sum(f.bytes for f in files)}
    _say(answer | {"digest": commit.digest}, f"{where} is whole: {len(files)} files, {commit.digest}", as_json)


@command.command(short_help="All weights in one safetensors file.")
@click.argument("checkpoint")
@click.argument("out", type=click.Path())
@as_json
def consolidate(checkpoint: str, out: str, as_json: bool) -> None:
    """Write CHECKPOINT's weights to the safetensors file OUT, under their own names.

    \b
    megatrain checkpoint consolidate runs/tiny tiny.safetensors
    """
    from megatrain.checkpoint.read import find, only_weights
    from megatrain.checkpoint.stream import consolidate as write

    n_bytes = write(find(checkpoint, states=only_weights).reader(), out)
    _say({"file": out, "bytes": n_bytes}, f"{out}: {n_bytes} bytes", as_json)


@command.command(short_help="The mean of several checkpoints' weights.")
@click.argument("checkpoints", nargs=-1, required=True)
@click.option("--out", required=True, type=click.Path(), help="The new checkpoint's folder.")
@click.option(
    "--share", "shares", multiple=True, type=float, help="Of each checkpoint, in their order; equal if left out."
)
@as_json
def average(checkpoints: tuple[str, ...], out: str, shares: tuple[float, ...], as_json: bool) -> None:
    """Average the weights of CHECKPOINTS (of one model) into a checkpoint for generate and checkpoint.init_from.

    \b
    megatrain checkpoint average runs/tiny/checkpoints/step-* --out soup
    """
    from megatrain.checkpoint.stream import average as mean

    commit = mean(list(checkpoints), out, list(shares) or None)
    words = f"{out}: the mean of {len(checkpoints)} checkpoints, {commit.digest}"
    _say({"folder": out, "step": commit.step, "of": len(checkpoints), "digest": commit.digest}, words, as_json)


def _say(answer: dict[str, Any], words: str, as_json: bool) -> None:
    click.echo(json.dumps(answer, indent=1) if as_json else words)


def _figure(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"
