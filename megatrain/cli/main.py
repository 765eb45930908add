"""`megatrain COMMAND ...`: finds the commands in this folder, imports the one called, and turns errors into codes.

Exit codes: 0 done, 1 failed, 2 a wrong call or configuration, 75 stopped as asked and resumable.
"""

import os
import pkgutil
import sys
from importlib import import_module

import click

import megatrain.cli
from megatrain.base.errors import EXIT_FAILURE, EXIT_PREEMPTED, EXIT_USAGE, UserError, did_you_mean


class Commands(click.Group):
    """The files of this folder that are not this one, by name; imported when called, so that each starts fast."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted(m.name for m in pkgutil.iter_modules(megatrain.cli.__path__) if m.name not in ("main", "common"))

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in self.list_commands(context):
            raise click.UsageError(f"there is no command {name!r}: {did_you_mean(name, self.list_commands(context))}")
        return import_module(f"megatrain.cli.{name}").command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name in self.list_commands(context):
            command = self.get_command(context, name)
            if command is not None:
                rows.append((name, command.get_short_help_str(90)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="megatrain")
def group() -> None:
    """Pretrain large Transformers: one model, one data order, one loss curve, whatever the layout.

    \b
    megatrain data build my_texts/ --out data
    megatrain train configs/run/tiny.yaml data.sources.0.path=data
    megatrain generate runs/tiny --prompt "def main("
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; never returns."""
    try:
        code = group.main(arguments, prog_name="megatrain", standalone_mode=False)
    except UserError as error:
        say(str(error))
        sys.exit(error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_USAGE)
    except (click.Abort, KeyboardInterrupt):
        say("stopped before anything was saved")
        sys.exit(EXIT_PREEMPTED)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone: no complaint
        sys.exit(EXIT_FAILURE)
    sys.exit(code if isinstance(code, int) else 0)  # a command that raises Exit(1) comes back with 1


def say(message: str) -> None:
    """An error message on stderr, with the rank's number where it is not the first."""
    rank = os.environ.get("RANK", "0")
    prefix = "megatrain: " if rank == "0" else f"megatrain [rank {rank}]: "
    lines = message.splitlines() or [""]
    if len(lines) > 1:
        heading = lines.pop(0) if lines[0].endswith(":") else f"{len(lines)} problems"
        lines = [heading, *(f"  - {line}" for line in lines)]
    sys.stderr.write(prefix + "\n".join(lines) + "\n")  # one write: other ranks speak at the same time
