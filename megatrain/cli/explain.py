"""`megatrain explain`: what a run file comes to, and where each value was written."""

import json
import shutil
import sys

import click
from rich.console import Console
from rich.table import Table

WIDE = 400
"""Columns where there is no terminal to wrap at: nothing is cut that a program may read."""


@click.command(short_help="Show a run file resolved: each value and where it was written.")
@click.argument("run_file", metavar="RUN.yaml")
@click.argument("overrides", nargs=-1, metavar="[key=value ...]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object: key -> {value, origin}; or the schedule.")
@click.option("--schedule", is_flag=True, help="Draw when each pipeline rank does what in a step, and its idle share.")
@click.option(
    "--ranks", type=click.IntRange(min=1), help="With --schedule: ranks of the run; as few as fit by default."
)
@click.option("--png", metavar="FILE", help="With --schedule: the picture; NAME-schedule.png here by default.")
def command(
    run_file: str, overrides: tuple[str, ...], as_json: bool, schedule: bool, ranks: int | None, png: str | None
) -> None:
    """Show every value of RUN.yaml with the file and line that set it; or the schedule of its pipeline.

    \b
    megatrain explain configs/run/tiny.yaml
    megatrain explain configs/run/tiny.yaml optimizer.lr=1e-3 --json
    megatrain explain configs/run/tiny.yaml layout.pp=2 layout.schedule=zbv --schedule --ranks 2
    """
    from megatrain.config.build import flat, plain
    from megatrain.train.check import problems_of
    from megatrain.train.config import read_run

    if not schedule and (png or ranks):
        raise click.UsageError("--png and --ranks are for --schedule: add it, or leave them out")
    found = read_run(run_file, overrides)
    if schedule:
        from megatrain.train.pipeline_picture import Picture

        picture = Picture.of(found.run, ranks)
        if as_json:
            click.echo(json.dumps(picture.plain()))
        else:
            click.echo(picture.text(shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDE))
        if png or not as_json:
            click.echo(f"picture: {picture.draw(png)}", err=as_json)
        return
    values = flat(plain(found.run))
    rows = {key: {"value": value, "origin": found.origins.get(key, "default")} for key, value in values.items()}
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    table = Table("key", "value", "from", box=None, header_style="bold")
    for key, row in rows.items():
        value = "-" if row["value"] is None else json.dumps(row["value"]).strip('"')
        table.add_row(key, value, row["origin"], style="dim" if row["origin"] == "default" else "")
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)
    for problem in problems_of(found.run, fewest := found.run.layout.fewest_ranks):
        click.echo(f"on {fewest} ranks, the fewest of this layout, it would be refused: {problem}", err=True)
