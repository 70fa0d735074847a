"""A connection: requests in, their heads and bodies checked, answers out."""

from __future__ import annotations

import json
import logging
import socket
import time
from http.client import HTTPMessage
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from mlx_lm.server import APIHandler

from .answer import error_event
from .bodies import parse
from .errors import ApiError, Gone, bad
from .guard import check_origin, key_of
from .http import ChunkedWriter, HeaderTooLarge, Idle, Reader, Slow

if TYPE_CHECKING:
    from .server import Server

log = logging.getLogger("mlx_dsa.serve")
_OPEN = ("/health",)


class Connection(APIHandler):
    """mlx-lm's handler of requests, with everything checked before it and adapted behind it.

    Args:
        server (Server): What is served.
        arguments: As the standard library's handlers take them.
    """

    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # of a request that says none: there is a status in every answer
    disable_nagle_algorithm = True
    rfile: Any
    wfile: Any

    def __init__(self, server: Server, *arguments: Any):
        self.app = server
        self._events = self._begins = False
        self._status = self._body_left = 0
        self.endpoint = ""
        super().__init__(server.generation, *arguments, system_fingerprint=server.fingerprint)

    # A connection.

    def setup(self) -> None:
        """Take the connection over."""
        super().setup()
        self.rfile = Reader(self.connection)

    def handle_one_request(self) -> None:
        """Read a request and answer it."""
        options = self.app.options
        self._events = self._begins = False
        self._status = 0
        self._body_left = -1  # not known
        self.endpoint = ""
        self.command = self.path = self.requestline = ""
        self.headers = HTTPMessage()
        self.request_version = "HTTP/1.1"
        self._headers_buffer: list[bytes] = []
        self.close_connection = True
        began = time.monotonic()
        try:
            self.rfile.begin(options.idle_seconds, options.header_seconds)
            began = time.monotonic()
            self.raw_requestline = self.rfile.readline(16385)
            if len(self.raw_requestline) > 16384:
                raise ApiError(414, "The address is too long.")
            if self.raw_requestline and self.parse_request():
                self._dispatch()
        except Idle:
            return
        except HeaderTooLarge:
            self._fail(ApiError(431, "The request's head is too large."))
        except Slow:
            self._fail(ApiError(408, "The request did not come in time."))
        except ApiError as error:
            self._fail(error)
        except (Gone, OSError):  # a client that has gone, or takes nothing
            self.close_connection = True
            self._status = self._status or 499
        except Exception as error:
            log.warning("%s failed: %s", self.path[:100], type(error).__name__, exc_info=True)
            self._fail(ApiError(500, "The server failed. Ask again."))
        self._tell(time.monotonic() - began)

    def _dispatch(self) -> None:
        try:
            url = urlsplit(self.path)
        except ValueError:
            raise bad("The address is not valid.") from None
        path = url.path
        self.query = parse_qs(url.query, max_num_fields=20) if len(url.query) < 4096 else {}
        if "Transfer-Encoding" in self.headers:
            raise ApiError(411, "Send the body with a Content-Length.")
        self._body_left = self._content_length()
        check_origin(self.headers, self.app.options, self.app.address[0])
        if self.command == "OPTIONS":
            return self.do_OPTIONS()
        if self._send_page(path):
            return
        self.endpoint, functions = self._find(path)
        if self.endpoint not in _OPEN and not self.app.admits(key_of(self.headers)):
            raise ApiError(
                401,
                "A valid API key is needed: send it as Authorization: Bearer KEY.",
                "invalid_api_key",
                {"WWW-Authenticate": "Bearer"},
            )
        if not functions:
            raise ApiError(404, "There is nothing at this address.", "not_found")
        method = "GET" if self.command == "HEAD" else self.command
        if method not in functions:
            allowed = ", ".join(sorted(functions))
            raise ApiError(405, f"This address takes {allowed}.", "method_not_allowed", {"Allow": allowed})
        function, rest = functions[method]
        function(self, rest)
        if self._body_left:
            self.close_connection = True  # a body that nobody has asked for

    def _find(self, path: str) -> tuple[str, dict[str, Any]]:
        return self.app.find(path)

    def _send_page(self, path: str) -> bool:
        return False

    def _content_length(self) -> int:
        values = set(self.headers.get_all("Content-Length", []))
        text = values.pop().strip() if values else ""
        if values or (text and not (text.isascii() and text.isdigit() and len(text) < 20)):
            raise bad("Content-Length is not a number.")
        return int(text or 0)

    # What routes use.

    def read_body(self, types: tuple[str, ...] = ("application/json", "application/x-www-form-urlencoded")) -> bytes:
        """Read the body.

        Args:
            types (tuple of str): The content types that it may have; it may have none.

        Returns:
            bytes: The body, not longer than the server takes.

        Raises:
            ApiError: 411, 413, 415, or 400 if it ends early.
        """
        if "Content-Length" not in self.headers:
            raise ApiError(411, "Send the body with a Content-Length.")
        most = self.app.options.max_body
        if self._body_left > most:
            raise ApiError(413, f"The body has {self._body_left:,} bytes but {most:,} is the most.")
        if self.headers.get("Content-Type") and self.headers.get_content_type() not in types:
            raise ApiError(415, f"The body must be {types[0]}.")
        if self.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise ApiError(415, "The body must not be compressed.")
        n = self._body_left
        self.rfile.limit_time(self.app.options.body_seconds + n / 1e6)
        raw = self.rfile.read(n)
        if len(raw) < n:
            self._body_left = 0
            raise bad("The body ends early.")
        self._body_left = 0
        self.connection.settimeout(self.app.options.write_seconds)
        return raw

    def read_json(self) -> dict[str, Any]:
        """Read the body, which must be an object of JSON."""
        return parse(self.read_body())

    def send_json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Answer with JSON."""
        self.send_bytes(json.dumps(value).encode(), "application/json", status, headers)

    def send_bytes(self, body: bytes, kind: str, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Answer with a body."""
        self._headers_buffer = []
        self.connection.settimeout(self.app.options.write_seconds)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self._set_cors_headers()
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def begin_events(self) -> None:
        """Answer with events, if that has not begun: ``self.wfile.write(b"data: ...\\n\\n")`` sends one."""
        if self._events:
            return
        self.connection.settimeout(self.app.options.write_seconds)
        self._set_stream_headers(200)
        self.end_headers()

    def end_events(self) -> None:
        """End the events."""
        if isinstance(self.wfile, ChunkedWriter):
            self.wfile.end()
            self.wfile = self.wfile._out
        self._events = False

    def send_event(self, value: Any) -> None:
        """Send an event with some JSON in it."""
        self.begin_events()
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())

    def has_gone(self) -> bool:
        """Whether the client has closed its connection."""
        return self.rfile.has_gone()

    # What mlx-lm's handler and the standard library call.

    def _set_cors_headers(self) -> None:
        allowed = self.app.options.allowed_origins
        origin = self.headers.get("Origin") if self.headers else None
        if "*" in allowed or (origin and origin in allowed):
            self.send_header("Access-Control-Allow-Origin", "*" if "*" in allowed else str(origin))
            self.send_header("Access-Control-Allow-Methods", "GET, POST, DELETE")
            self.send_header("Access-Control-Allow-Headers", "*, Authorization")
        if allowed and "*" not in allowed:
            self.send_header("Vary", "Origin")

    def _set_completion_headers(self, status_code: int = 200) -> None:
        self.send_response(status_code)
        self.send_header("Content-Type", "application/json")
        self._set_cors_headers()

    def _set_stream_headers(self, status_code: int = 200) -> None:
        if self._events:
            return
        self.send_response(status_code)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-cache")
        self._set_cors_headers()
        self._begins = True
        if self.request_version == "HTTP/1.1":
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.close_connection = True

    def end_headers(self) -> None:
        """Send the head; nothing if events have begun."""
        if self._events:
            return
        if self.close_connection:
            self.send_header("Connection", "close")
        super().end_headers()
        if self._begins:
            self._begins, self._events = False, True
            if self.request_version == "HTTP/1.1":
                self.wfile = ChunkedWriter(self.wfile)

    def do_OPTIONS(self) -> None:
        """Answer what a browser asks first."""
        self.send_response(204)
        self._set_cors_headers()
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_response(self, code: int, message: str | None = None) -> None:
        """Begin an answer."""
        self._status = code
        super().send_response(code, message)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what the standard library refuses."""
        self._fail(ApiError(code if code < 500 else 400, f"{message or 'The request is not valid'}."[:300]))

    def version_string(self) -> str:
        """Name the server."""
        return "mlx-dsa"

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing here: a request is told once, when it is answered."""

    def _fail(self, error: ApiError) -> None:
        """Answer with an error, as far as the answer allows it still."""
        try:
            if self._events:
                self.wfile.write(error_event(error))
                self.end_events()
                return
            unread = self._body_left
            if unread:
                self.close_connection = True
            self.send_json(error.body(), error.status, error.headers)
            if self.close_connection:
                self.connection.shutdown(socket.SHUT_WR)
                self.rfile.drop(8 << 20 if unread else 1 << 16, 1.0 if unread else 0.1)
        except OSError:
            self.close_connection = True

    def _tell(self, seconds: float) -> None:
        if not self._status:
            return
        endpoint = self.endpoint or "other"
        self.app.metrics.request(endpoint, self._status)
        log.info("%s %s %d %.0f ms", self.command or "-", endpoint, self._status, seconds * 1000)
