"""Real servers that misbehave on request: HTTP of a folder, and an object store that speaks S3."""

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, Self

Fault = Callable[["Handler", bytes, int], bool]
"""Called with the handler, the body it would send and the number of the request; True if it has answered itself."""


class Handler(BaseHTTPRequestHandler):
    server: "Server"
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        with self.server.lock:
            number = self.server.requests.total()
            self.server.requests[path] += 1
            self.server.seen.append((self.path, dict(self.headers)))
        file = self.server.folder / path.lstrip("/")
        if not file.is_file():
            return self.answer(404, b"no")
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and self.server.ranges:
            with open(file, "rb") as opened:
                opened.seek(int(asked[1]))
                body, status = opened.read(int(asked[2]) + 1 - int(asked[1])), 206
        else:
            body, status = file.read_bytes(), 200
        if self.server.fault is not None and self.server.fault(self, body, number):
            return None
        return self.answer(status, body)

    def answer(self, status: int, body: bytes, promise: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if promise is None else promise))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        if promise is not None:
            self.close_connection = True

    def log_message(self, *_: object) -> None: ...


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path, fault: Fault | None = None, ranges: bool = True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.fault, self.ranges = folder, fault, ranges
        self.requests: Counter[str] = Counter()
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None: ...  # clients that hang up are part of the test

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


# ------------------------------------------------------------------------------------------------ faults


def answers_503(handler: Handler, body: bytes, number: int) -> bool:
    if number % 3 == 2:
        return False
    handler.answer((500, 503, 429)[number % 3], b"busy")
    return True


def hangs_up(handler: Handler, body: bytes, number: int) -> bool:
    if number % 3 == 0:
        handler.close_connection = True
        handler.connection.close()
        return True
    return False


def sends_half(handler: Handler, body: bytes, number: int) -> bool:
    if number % 2 or len(body) < 2:
        return False
    handler.answer(206 if "Range" in handler.headers else 200, body[: len(body) // 2], promise=len(body))
    return True


def stalls(handler: Handler, body: bytes, number: int) -> bool:
    if number % 4 or len(body) < 2:
        return False
    handler.send_response(206 if "Range" in handler.headers else 200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.wfile.flush()
    time.sleep(1.0)  # longer than the client's patience with one read
    handler.close_connection = True
    return True


FAULTS = [answers_503, hangs_up, sends_half, stalls]


# ------------------------------------------------------------------------------------------------ an object store

ObjectFault = Callable[[str, int], str | None]
"""Called with the path of a GET and its number among them; "500", "short", "stall", or None for a sound answer."""


class ObjectServer:
    """S3 in memory (moto's server), with an address for `AWS_ENDPOINT_URL`.

    with ObjectServer() as server:
        server.upload(folder, "bucket", "prefix")     # then read s3://bucket/prefix
        server.fault = lambda path, number: "500" if number % 2 else None
    """

    credentials: ClassVar[dict[str, str]] = {
        "AWS_ACCESS_KEY_ID": "key-of-tests",
        "AWS_SECRET_ACCESS_KEY": "secret-of-tests",
        "AWS_DEFAULT_REGION": "us-east-1",
    }

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log(self, *_: object) -> None: ...

        self.fault: ObjectFault | None = None
        self.gets: list[str] = []
        """Paths of all GETs so far."""
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Quiet)
        self._server.daemon_threads = True

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to find the server and be let in."""
        return {"AWS_ENDPOINT_URL": self.address, **self.credentials}

    def upload(self, folder: Path, bucket: str, prefix: str) -> str:
        """Put all files of `folder` under a prefix of a new bucket; returns its address."""
        import boto3

        names = {name.lower(): value for name, value in self.credentials.items()}
        region = names.pop("aws_default_region")
        client = boto3.client("s3", endpoint_url=self.address, region_name=region, **names)
        client.create_bucket(Bucket=bucket)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                client.put_object(Bucket=bucket, Key=f"{prefix}/{path.relative_to(folder)}", Body=path.read_bytes())
        return f"s3://{bucket}/{prefix}"

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] != "GET":
            return self._app(environ, start)
        number = len(self.gets)
        self.gets.append(environ["PATH_INFO"])
        fault = self.fault(environ["PATH_INFO"], number) if self.fault is not None else None
        if fault == "500":
            start("500 Internal Server Error", [("Content-Length", "0")])
            return []
        body = self._app(environ, start)
        return body if fault is None else _half(b"".join(body), stall=fault == "stall")

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _half(body: bytes, stall: bool) -> Iterator[bytes]:
    """Half of what the headers promise, and then the end, or silence that outlasts the client's patience."""
    yield body[: len(body) // 2]
    if stall:
        time.sleep(1.0)
