"""`megatrain report`: a run folder as one page."""

import json

import click


@click.command(short_help="Show a run as one self-contained page.")
@click.argument("run_dir", metavar="RUN_DIR")
@click.option("--serve", is_flag=True, help="Serve the page on this machine, drawn anew at each request.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port of --serve.  [default: one that is free]")
@click.option("--json", "as_json", is_flag=True, help="Print the run in a few figures instead, as one JSON object.")
def command(run_dir: str, serve: bool, port: int, as_json: bool) -> None:
    """Write RUN_DIR/report.html: curves, events, facts and configuration, with no network needed to read it.

    \b
    megatrain report runs/tiny
    megatrain report runs/tiny --serve --port 8000
    """
    from megatrain.report.page import write_report
    from megatrain.report.run import read_run, summary

    if as_json:
        click.echo(json.dumps(summary(read_run(run_dir))))
        return
    path = write_report(run_dir)
    if not serve:
        click.echo(path)
        return
    from megatrain.report.serve import server

    with server(run_dir, port) as http:
        click.echo(f"serving {run_dir} at http://127.0.0.1:{http.server_address[1]}/ until Ctrl-C")
        try:
            http.serve_forever()
        except KeyboardInterrupt:
            click.echo("stopped")
