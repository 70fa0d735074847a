"""Sockets and HTTP/1.1 with bounds: on time, on headers, on connections."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from http.server import ThreadingHTTPServer
from typing import Any

log = logging.getLogger("mlx_dsa.serve")
_MOST_HEADER = 64 << 10
_PIECE = 64 << 10


class HeaderTooLarge(Exception):
    """The head of a request is longer than a server takes."""


class Slow(Exception):
    """A client has not sent in time what it began to send."""


class Idle(Exception):
    """A client sends nothing, or has gone, between two requests."""


class Reader:
    """What comes in on a socket, read before a deadline and up to a bound.

    Args:
        connection (socket): The client's.
    """

    def __init__(self, connection: socket.socket):
        self._socket = connection
        self._buffer = bytearray()
        self._deadline = 0.0
        self._left: int | None = None
        self.closed = False

    def begin(self, idle: float, seconds: float) -> None:
        """Wait for a request, whose head must come within some seconds then.

        Args:
            idle (float): Seconds to wait for its first byte.
            seconds (float): Seconds for its head.

        Raises:
            Idle: If none comes.
        """
        self._left = None
        self.limit_time(idle)
        try:
            if not self._buffer and not self._fill():
                raise Idle
        except (Slow, OSError):
            raise Idle from None
        self.limit_time(seconds)
        self._left = _MOST_HEADER

    def limit_time(self, seconds: float) -> None:
        """Set how long reading may take from now on."""
        self._deadline = time.monotonic() + seconds

    def _fill(self) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise Slow
        self._socket.settimeout(left)
        try:
            piece = self._socket.recv(_PIECE)
        except TimeoutError:
            raise Slow from None
        self._buffer += piece
        return len(piece)

    def _take(self, n: int) -> bytes:
        piece = bytes(self._buffer[:n])
        del self._buffer[:n]
        return piece

    def readline(self, limit: int = -1) -> bytes:
        """Read a line of a request's head, with its end.

        Raises:
            Slow: If it does not come in time.
            HeaderTooLarge: If the head is too long.
        """
        limit = limit if limit >= 0 else _MOST_HEADER + 1
        begin = 0
        while (end := self._buffer.find(b"\n", begin)) < 0 and len(self._buffer) < limit:
            begin = len(self._buffer)
            if self._left is not None and begin > self._left:
                raise HeaderTooLarge
            if not self._fill():
                break
        line = self._take(min(limit, end + 1 if end >= 0 else len(self._buffer)))
        if self._left is not None:
            self._left -= len(line)
            if self._left < 0:
                raise HeaderTooLarge
        return line

    def read(self, n: int) -> bytes:
        """Read some bytes; fewer, if the client has gone.

        Raises:
            Slow: If they do not come in time.
        """
        while len(self._buffer) < n and self._fill():
            pass
        return self._take(n)

    def drop(self, n: int, seconds: float) -> None:
        """Take in and forget what a client still sends, so that it reads what it is answered."""
        self.limit_time(seconds)
        n -= len(self._buffer)
        self._buffer.clear()
        try:
            while n > 0 and (got := self._fill()):
                n -= got
                self._buffer.clear()
        except (Slow, OSError):
            pass

    def has_gone(self) -> bool:
        """Whether the client has closed its connection."""
        if self._buffer:
            return False
        timeout = self._socket.gettimeout()
        try:
            self._socket.settimeout(0)
            return not self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            try:
                self._socket.settimeout(timeout)
            except OSError:
                pass

    def close(self) -> None:
        """Follow the contract of files."""
        self.closed = True


class ChunkedWriter:
    """Write an answer of unknown length in chunks.

    Args:
        out: The file of the connection.
    """

    closed = False

    def __init__(self, out: Any):
        self._out = out

    def write(self, data: bytes) -> int:
        """Write a chunk."""
        if data:
            self._out.write(b"%x\r\n%b\r\n" % (len(data), data))
        return len(data)

    def flush(self) -> None:
        """Do nothing: every chunk has been sent."""

    def end(self) -> None:
        """Write the end."""
        self._out.write(b"0\r\n\r\n")

    def close(self) -> None:
        """Close the file; what has not been ended stays so, which tells the client."""
        self.closed = True
        self._out.close()


def check_address(host: str, port: int) -> None:
    """Refuse an address that can't be listened at, before a model is loaded for it.

    Args:
        host (str): The address.
        port (int): The port.

    Raises:
        ValueError: If it is taken, or not of this machine.
    """
    try:
        HttpServer(host, port, None, 1).server_close()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no address"
        raise ValueError(
            f"[serve] can't listen at {host or 'an empty --host'}, port {port}: {reason}. Give another --port "
            f"(0 takes a free one) or --host."
        ) from None


class HttpServer(ThreadingHTTPServer):
    """Listen, with a thread a connection and a bound on connections.

    Args:
        host (str): The address.
        port (int): The port; 0 for a free one.
        handler (callable): Makes the handler of a connection.
        max_connections (int): Connections at once.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(self, host: str, port: int, handler: Any, max_connections: int):
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        address: Any
        self.address_family, _, _, _, address = infos[0]
        self._free = threading.Semaphore(max_connections)
        self._open: dict[Any, threading.Thread] = {}
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Bind, without asking a name server for the host's name."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        name, self.server_port = self.server_address[:2]
        self.server_name = str(name)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection in a thread of its own, if there may be one more."""
        if self._free.acquire(blocking=False):
            try:
                super().process_request(request, client_address)
            except BaseException:
                self._free.release()
                raise
            return
        body = json.dumps({"error": {"message": "There are too many connections.", "type": "overloaded_error"}})
        head = "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        try:
            request.settimeout(1)
            request.sendall((head + body).encode())
        except OSError:
            pass
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a connection."""
        self._open[request] = threading.current_thread()
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._open.pop(request, None)
            self._free.release()

    def close_connections(self, seconds: float) -> None:
        """Close what is open, and wait for its threads: one that lives on when Python ends can take it down.

        Args:
            seconds (float): How long to wait.
        """
        end = time.monotonic() + seconds
        for connection, thread in list(self._open.items()):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            thread.join(max(0.0, end - time.monotonic()))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Tell what no handler has caught, in a line."""
        log.warning("A connection failed.", exc_info=log.isEnabledFor(logging.DEBUG))
