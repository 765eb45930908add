"""`megatrain train`: run a run file, alone, as one rank of many, or starting the ranks itself."""

import sys

import click


@click.command(short_help="Train (or resume) a run file.")
@click.argument("run_file", metavar="RUN.yaml")
@click.argument("overrides", nargs=-1, metavar="[key=value ...]")
@click.option("--nproc", type=click.IntRange(min=1), help="Start this many ranks on this machine.")
def command(run_file: str, overrides: tuple[str, ...], nproc: int | None) -> None:
    """Train RUN.yaml; on a run folder that holds checkpoints, resume.

    Under torchrun, srun or mpirun this process is one rank; with --nproc it starts the ranks. Ctrl-C and SIGTERM end
    the step under way, save, and exit with code 75; started again, the run goes on from there.

    \b
    megatrain train configs/run/tiny.yaml --nproc 2
    megatrain train configs/run/tiny.yaml train.steps=100 optimizer.lr=1e-3
    torchrun --nproc-per-node 8 -m megatrain train configs/run/tiny.yaml
    """
    from megatrain.train.config import read_run
    from megatrain.train.run import train

    if nproc is None:
        train(run_file, overrides)
        return
    from megatrain.base.log import start_logging
    from megatrain.cluster.local_ranks import run_local_ranks
    from megatrain.train.check import refuse
    from megatrain.train.resume import finished

    start_logging()
    run = read_run(run_file, overrides).run
    refuse(run, world=nproc)
    if finished(run):
        return
    sys.exit(run_local_ranks(nproc, [sys.executable, "-m", "megatrain", "train", run_file, *overrides]))
