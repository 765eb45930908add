"""A real HTTP server of a folder that misbehaves on request."""

import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

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
