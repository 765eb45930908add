"""The report over HTTP on this machine, drawn anew at each request."""

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from megatrain.base.errors import UserError
from megatrain.report.page import page
from megatrain.report.run import read_run

RELOAD_SECONDS = 30


def server(run_dir: str | Path, port: int = 0) -> ThreadingHTTPServer:
    """A server of the run's page on 127.0.0.1 (port 0: one that is free); call `serve_forever()`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/":
                self.send_error(404)
                return
            try:
                status, text = 200, page(read_run(run_dir), reload_seconds=RELOAD_SECONDS)
            except UserError as error:  # the run may be being written
                status, text = 503, str(error)
            body = text.encode()
            self.send_response(status)
            self.send_header(
                "Content-Type", "text/html; charset=utf-8" if status == 200 else "text/plain; charset=utf-8"
            )
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: the console is the user's."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)
