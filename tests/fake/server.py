"""A World on 127.0.0.1, over HTTP: nothing ever leaves this computer."""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import socket
import struct
import sys
import threading
import time
import urllib.parse
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable

from tests.fake.api import POST_ONLY, SHAPES, Field
from tests.fake.organisation import Organisation
from tests.fake.trouble import Answer, Refused, Request
from tests.fake.world import World


def from_query(shape: dict[str, Field], query: str) -> dict[str, Any]:
    """The body that a GET spells as a query string; arrays are repeated or separated by commas."""
    body: dict[str, Any] = {}
    for name, values in urllib.parse.parse_qs(query, keep_blank_values=True).items():
        kind = shape[name].kind if name in shape else "text"
        if kind.endswith("s"):
            body[name] = [part for value in values for part in value.split(",")]
        elif kind == "int" and re.fullmatch(r"-?[0-9]+", values[-1]):
            body[name] = int(values[-1])
        elif kind == "bool" and values[-1] in ("true", "false"):
            body[name] = values[-1] == "true"
        else:
            body[name] = values[-1]
    return body


class Handler(BaseHTTPRequestHandler):
    """One connection. Each answer leaves in one write: no packet waits for another's ACK."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do_GET(self) -> None:
        """Answer a request whose properties are in the query string."""
        self._exchange("GET")

    def do_POST(self) -> None:
        """Answer a request whose properties are in a JSON body."""
        self._exchange("POST")

    def log_message(self, format: str, *args: Any) -> None:
        """Stay quiet: the sandbox keeps a record of its own."""

    def _exchange(self, method: str) -> None:
        address = urllib.parse.urlsplit(self.path)
        if method == "GET" and address.path in self.server.sandbox.pages:
            content_type, make = self.server.sandbox.pages[address.path]
            answer = Answer(200, make().encode("utf-8"), content_type=content_type)
            self.wfile.write(self._head(answer) + answer.payload)
            return
        endpoint = address.path.lstrip("/")
        started = time.monotonic()
        body, problem = self._read(method, endpoint, address.query)
        if method == "GET" and endpoint in POST_ONLY:
            problem = Refused(404, "not_found", f"no such endpoint: {method} /{endpoint}")
        sandbox = self.server.sandbox
        request = sandbox.record(endpoint, body, started)
        if sandbox.latency:
            time.sleep(sandbox.latency)
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        answer = sandbox.answer(request, token if scheme == "Bearer" else None, problem)
        self._reply(request, answer)

    def _read(
        self, method: str, endpoint: str, query: str
    ) -> tuple[dict[str, Any], Refused | None]:
        try:
            length = int(self.headers.get("Content-Length") or 0)
        except ValueError:
            length = -1
        if length < 0 or "Transfer-Encoding" in self.headers:
            self.close_connection = True
            return {}, Refused(400, "bad_request", "a Content-Length is needed")
        raw = self.rfile.read(length)
        if len(raw) < length:
            raise ConnectionAbortedError("the client went away in the middle of a request")
        if method == "GET":
            return from_query(SHAPES.get(endpoint, {}), query), None
        kind = self.headers.get_content_type() if raw and "Content-Type" in self.headers else ""
        if kind != "application/json":
            return {}, Refused(
                400, "invalid_content_type", "the body must be application/json", value=kind
            )
        try:
            body = json.loads(raw.decode("utf-8"))
        except ValueError:
            return {}, Refused(400, "parse_error", "the body is not JSON")
        if not isinstance(body, dict):
            return {}, Refused(400, "parse_error", "the body is not a JSON object")
        return body, None

    def _reply(self, request: Request, answer: Answer) -> None:
        if answer.manner in ("hang", "reset"):
            if answer.manner == "hang":
                self._hold(answer.seconds)
            request.ended = time.monotonic()
            self.close_connection = True
            self.server.reset(self.connection)
            return
        payload = answer.payload
        if answer.manner == "cut":
            payload = payload[: len(payload) // 2]
            self.close_connection = True
        elif answer.manner == "send" and answer.seconds:
            self.server.closing.wait(answer.seconds)
        request.ended = time.monotonic()
        try:
            if answer.manner == "drip":
                self._drip(answer)
            else:
                self.wfile.write(self._head(answer) + payload)
        except OSError:
            request.status = None
            self.close_connection = True

    def _head(self, answer: Answer) -> bytes:
        lines = [
            f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}",
            "Date: " + self.date_time_string(),
        ]
        if answer.status != 204:
            lines += [
                "Content-Type: " + answer.content_type,
                f"Content-Length: {len(answer.payload)}",
            ]
        lines += [f"{name}: {value}" for name, value in answer.headers.items()]
        if self.close_connection and answer.manner == "send":
            lines.append("Connection: close")
        return "\r\n".join(lines + ["", ""]).encode("latin-1", "replace")

    def _drip(self, answer: Answer) -> None:
        self.wfile.write(self._head(answer))
        for byte in answer.payload:
            if self.server.closing.wait(answer.seconds):
                return
            self.wfile.write(bytes([byte]))

    def _hold(self, seconds: float) -> None:
        """Say nothing until the client hangs up, the time is over, or the sandbox closes."""
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self.connection, selectors.EVENT_READ)
            while time.monotonic() < deadline and not self.server.closing.wait(0.02):
                if not selector.select(0):
                    continue
                try:
                    if not self.connection.recv(1, socket.MSG_PEEK):
                        return
                except OSError:
                    return


class Server(ThreadingHTTPServer):
    """Threads and sockets: knows every open connection, so that it can close them all."""

    daemon_threads = True
    request_queue_size = 256
    allow_reuse_address = os.name != "nt"

    def __init__(self, sandbox: Sandbox, port: int) -> None:
        self.sandbox = sandbox
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._abandoned: set[socket.socket] = set()
        self.accepted = 0
        super().__init__(("127.0.0.1", port), Handler)

    def server_bind(self) -> None:
        """Bind without asking a name server who 127.0.0.1 is."""
        self.socket.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, int(self.allow_reuse_address)
        )
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "127.0.0.1", int(self.server_address[1])

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection and remember it."""
        connection, address = super().get_request()
        with self._lock:
            self._open.add(connection)
            self.accepted += 1
        return connection, address

    def reset(self, connection: socket.socket) -> None:
        """Let the connection end with RST rather than with FIN."""
        with self._lock:
            self._abandoned.add(connection)
        linger = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection; one to be reset gets no orderly farewell."""
        with self._lock:
            self._open.discard(request)
            abandoned = request in self._abandoned
            self._abandoned.discard(request)
        if abandoned:
            self.close_request(request)
        else:
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news; anything else is a mistake in the sandbox."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def close_all(self) -> None:
        """Stop listening and hang up on everyone."""
        self.closing.set()
        self.shutdown()
        self.server_close()
        with self._lock:
            remaining = list(self._open)
        for connection in remaining:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Sandbox(World):
    """A world, served on 127.0.0.1 for as long as the `with` block lasts.

    `latency` is how many seconds each request takes longer; it may be changed while it runs, as all that a World has.
    """

    def __init__(
        self, organisation: Organisation, *, port: int = 0, latency: float = 0.0, **world: Any
    ) -> None:
        super().__init__(organisation, time.monotonic, time.time, **world)
        self.latency = latency
        # Pages for people, by path: content type, and what makes the page.
        self.pages: dict[str, tuple[str, Callable[[], str]]] = {}
        self._port = port

    def __enter__(self) -> Sandbox:
        self._server = Server(self, self._port)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._threads = [
            threading.Thread(
                target=self._server.serve_forever, args=(0.02,), name="sandbox", daemon=True
            ),
            threading.Thread(target=self._keep_time, name="sandbox-time", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.close_all()
        for thread in self._threads:
            thread.join()

    @property
    def connections(self) -> int:
        """How many connections were accepted."""
        return self._server.accepted

    def environment(self) -> dict[str, str]:
        """The environment variables that point the tool at this sandbox."""
        return {"DEVREV_API_TOKEN": self.token, "DEVREV_BASE_URL": self.url}

    def _keep_time(self) -> None:
        """Whoever only looks at the organisation sees merges happen, too."""
        while not self._server.closing.wait(0.02):
            self.catch_up()
