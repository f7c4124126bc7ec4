"""The page of a served model, and the way from a browser to its server."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources

from mskip.compressor.errors import MskipError
from mskip.exporters.triton.server import HOST, Ports

_MOST = 1 << 22
"""Bytes of a request."""


class _Handler(BaseHTTPRequestHandler):
    """The page; what begins with /v2/ and the metrics are passed on."""

    ports: Ports
    page: bytes

    def do_GET(self) -> None:
        if self.path.partition("?")[0] == "/":
            self._answer(200, "text/html; charset=utf-8", self.page)
        elif self.path == "/metrics":
            self._pass_on("GET", self.ports.metrics, None)
        elif self.path == "/stats":
            self._statistics()
        elif self.path.startswith("/v2/"):
            self._pass_on("GET", self.ports.http, None)
        else:
            self._answer(404, "text/plain", b"there is / and /metrics and /stats and /v2/...\n")

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        allowed = self.path.startswith(("/v2/models/generate/", "/v2/models/ensemble/"))
        if not allowed or not length.isdecimal() or int(length) > _MOST:
            self._answer(404, "text/plain", b"only requests to generate and ensemble\n")
            return
        self._pass_on("POST", self.ports.http, self.rfile.read(int(length)))

    def _statistics(self) -> None:
        """What "generate" has measured, as JSON and not as a text within JSON."""
        path, body = "/v2/models/generate/generate", b'{"server_statistics": true}'
        with self._asked("POST", self.ports.http, path, body) as answer:
            if answer is not None:
                made = answer.read()
                if answer.status == 200:
                    made = json.loads(made)["statistics"].encode()
                self._answer(answer.status, "application/json", made)

    def _pass_on(self, method: str, port: int, body: bytes | None) -> None:
        with self._asked(method, port, self.path, body) as answer:
            if answer is not None:
                self.send_response(answer.status)
                kind = answer.headers.get("Content-Type", "application/json")
                self.send_header("Content-Type", kind)
                self.end_headers()
                while piece := answer.read1(1 << 16):
                    self.wfile.write(piece)
                    self.wfile.flush()

    @contextmanager
    def _asked(
        self, method: str, port: int, path: str, body: bytes | None
    ) -> Iterator[http.client.HTTPResponse | None]:
        """The server's answer, or None where there is none, which the browser has been told.

        If the browser goes away, so does this connection, and with it the request. An answer of
        which a part was passed on can only break off.
        """
        upstream = http.client.HTTPConnection(HOST, port, timeout=600)
        with closing(upstream), suppress(OSError, http.client.HTTPException):
            try:
                upstream.request(method, path, body)
                answer = upstream.getresponse()
            except (OSError, http.client.HTTPException):
                self._answer(502, "text/plain", b"the server does not answer\n")
                yield None
            else:
                yield answer

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the server has its own log."""


@contextmanager
def page_served(ports: Ports, port: int) -> Iterator[str]:
    """Serve the page as long as the block lasts; gives its address.

    Args:
        ports: of the server that it is about.
        port: of the page, on the loopback interface; 0 is any.

    Raises:
        MskipError: the port is taken.
    """
    page = (resources.files("mskip.exporters.triton") / "assets/page.html").read_bytes()
    handler = type("Handler", (_Handler,), {"ports": ports, "page": page})
    try:
        server = ThreadingHTTPServer((HOST, port), handler)
    except OSError as error:
        raise MskipError(
            f"port {port} on {HOST} cannot be had: {error.strerror}.", "Choose another: --port"
        ) from error
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
