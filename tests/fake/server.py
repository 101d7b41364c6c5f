"""A World on 127.0.0.1, over HTTP: nothing ever leaves this computer."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import socketserver
import struct
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable

from tests.fake.organisation import Organisation
from tests.fake.trouble import Answer, Refused, Request
from tests.fake.world import World


class Handler(BaseHTTPRequestHandler):
    """One connection. Each answer leaves in one write: no packet waits for another's ACK."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do_GET(self) -> None:
        """Show a page for people; the tool's requests are POSTs."""
        make = self.server.sandbox.pages.get(self.path)
        if make is None:
            self._exchange(Refused(404, f"no such page: {self.path}"))
            return
        answer = Answer(200, make().encode("utf-8"), content_type="text/html; charset=utf-8")
        self.wfile.write(self._head(answer) + answer.payload)

    def do_POST(self) -> None:
        """Answer a request whose properties are in a JSON body."""
        self._exchange()

    def log_message(self, format: str, *args: Any) -> None:
        """Stay quiet: the sandbox keeps a record of its own."""

    def _exchange(self, problem: Refused | None = None) -> None:
        started = time.monotonic()
        body: dict[str, Any] = {}
        try:
            body = self._read() if problem is None else {}
        except Refused as refusal:
            problem = refusal
        sandbox = self.server.sandbox
        request = sandbox.record(self.path.partition("?")[0].lstrip("/"), body, started)
        if sandbox.latency:
            time.sleep(sandbox.latency)
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        answer = sandbox.answer(request, token if scheme == "Bearer" else None, problem)
        self._reply(request, answer)

    def _read(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "0")
        if not length.isdigit() or "Transfer-Encoding" in self.headers:
            self.close_connection = True
            raise Refused(400, "a Content-Length is needed")
        raw = self.rfile.read(int(length))
        if len(raw) < int(length):
            raise ConnectionAbortedError("the client went away in the middle of a request")
        kind = self.headers.get_content_type() if raw and "Content-Type" in self.headers else ""
        if kind != "application/json":
            message = "the body must be application/json"
            raise Refused(400, message, "invalid_content_type", value=kind)
        try:
            body = json.loads(raw.decode("utf-8"))
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise Refused(400, "the body is not a JSON object", "parse_error")
        return body

    def _reply(self, request: Request, answer: Answer) -> None:
        if answer.manner in ("hang", "reset"):
            if answer.manner == "hang":
                self.server.closing.wait(answer.seconds)
            self._reset()
            return
        payload = answer.payload
        if answer.manner == "cut":
            payload = payload[: len(payload) // 2]
            self.close_connection = True
        elif answer.manner == "send" and answer.seconds:
            self.server.closing.wait(answer.seconds)
        try:
            if answer.manner == "drip":
                self._drip(answer)
            else:
                self.wfile.write(self._head(answer) + payload)
        except OSError:
            request.status = None
            self.close_connection = True

    def _reset(self) -> None:
        """Let the connection end with RST rather than with FIN."""
        self.close_connection = True
        linger = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.rfile.close()
        self.connection.close()

    def _head(self, answer: Answer) -> bytes:
        headers = {"Date": self.date_time_string(), **answer.headers}
        if answer.status != 204:
            headers["Content-Type"] = answer.content_type
            headers["Content-Length"] = str(len(answer.payload))
        if self.close_connection and answer.manner == "send":
            headers["Connection"] = "close"
        lines = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")

    def _drip(self, answer: Answer) -> None:
        self.wfile.write(self._head(answer))
        for byte in answer.payload:
            if self.server.closing.wait(answer.seconds):
                return
            self.wfile.write(bytes([byte]))


class Server(ThreadingHTTPServer):
    """Threads and sockets: knows every open connection, so that it can close them all."""

    daemon_threads = True
    request_queue_size = 256
    allow_reuse_address = os.name != "nt"

    def __init__(self, sandbox: Sandbox, port: int) -> None:
        self.sandbox = sandbox
        self.closing = threading.Event()
        self._open: set[socket.socket] = set()
        self.accepted = 0
        super().__init__(("127.0.0.1", port), Handler)

    def server_bind(self) -> None:
        """Bind without asking a name server who 127.0.0.1 is."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", int(self.server_address[1])

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._open.add(connection)
        self.accepted += 1
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news; anything else is a mistake in the sandbox."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def close_all(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()
        for connection in self._open.copy():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Sandbox(World):
    """A world, served on 127.0.0.1 for as long as the `with` block lasts.

    `latency` is how many seconds each request takes longer; it may be changed while it runs.
    """

    def __init__(
        self, organisation: Organisation, *, port: int = 0, latency: float = 0.0, **world: Any
    ) -> None:
        super().__init__(organisation, time.monotonic, time.time, **world)
        self.latency = latency
        self.pages: dict[str, Callable[[], str]] = {}  # for people, by path
        self._port = port

    def __enter__(self) -> Sandbox:
        self._server = Server(self, self._port)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        loops = lambda: self._server.serve_forever(0.02), self._keep_time
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in loops]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.close_all()
        for thread in self._threads:
            thread.join()

    @property
    def connections(self) -> int:
        return self._server.accepted

    def environment(self) -> dict[str, str]:
        return {"DEVREV_API_TOKEN": self.token, "DEVREV_BASE_URL": self.url}

    def _keep_time(self) -> None:
        """Whoever only looks at the organisation sees merges happen, too."""
        while not self._server.closing.wait(0.02):
            self.catch_up()
