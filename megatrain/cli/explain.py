"""`megatrain explain`: what a run file comes to, and where each value was written."""

import json
import sys

import click
from rich.console import Console
from rich.table import Table

WIDE = 400
"""Columns where there is no terminal to wrap at: nothing is cut that a program may read."""


@click.command(short_help="Show a run file resolved: each value and where it was written.")
@click.argument("run_file", metavar="RUN.yaml")
@click.argument("overrides", nargs=-1, metavar="[key=value ...]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object: key -> {value, origin}.")
def command(run_file: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show every value of RUN.yaml with the file and line that set it.

    \b
    megatrain explain configs/run/tiny.yaml
    megatrain explain configs/run/tiny.yaml optimizer.lr=1e-3 --json
    """
    from megatrain.config.build import flat, plain
    from megatrain.train.config import read_run

    found = read_run(run_file, overrides)
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
