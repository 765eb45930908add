"""`megatrain verify`: is this run the same under a layout as in one process?"""

import dataclasses
import json
import sys

import click


@click.command(short_help="Prove that a layout gives this run the losses and gradients of one process.")
@click.argument("run_file", metavar="RUN.yaml")
@click.argument("overrides", nargs=-1, metavar="[key=value ...]")
@click.option(
    "--layout", required=True, help="For example tp=2,dp=2,zero=1; axes not named are 1, zero is 0 (2 under fsdp2)."
)
@click.option("--steps", type=click.IntRange(min=1), default=3, show_default=True, help="Steps that are compared.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the line.")
def command(run_file: str, overrides: tuple[str, ...], layout: str, steps: int, as_json: bool) -> None:
    """Run the first steps of RUN.yaml twice on this machine's CPU in float32: as one process and under the layout.

    The last line says `equal` with the largest relative differences of losses, gradient norms and full gradients, or
    `differs` with the tensor that is off most and the collective that feeds it. Exit code 0 only when equal, else 1.

    \b
    megatrain verify configs/run/tiny.yaml --layout tp=2
    megatrain verify configs/run/tiny.yaml --layout tp=2,dp=2,zero=3 --steps 5 model.n_layers=2
    """
    from megatrain.train.verify import verify

    verdict = verify(run_file, overrides, layout, steps)
    if as_json:
        told = json.loads(json.dumps(dataclasses.asdict(verdict)), parse_constant=lambda name: None)  # NaN is no JSON
        click.echo(json.dumps({"equal": verdict.equal, **told}))
    else:
        click.echo(verdict.line())
    sys.exit(0 if verdict.equal else 1)
