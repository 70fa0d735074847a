"""A pseudo-terminal with a program of this package in it."""

import os
import pty
import re
import select
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 90  # seconds, on a machine that does other work, too


class Terminal:
    """Run Python in a terminal of 80 columns, type, and read what it shows.

    Args:
        *arguments (str): What follows ``python``.
        term (str): The kind of terminal. Default: ``"dumb"``.
        typed (bytes): What is typed before the program begins. Default: ``b""``.
    """

    def __init__(self, *arguments, term="dumb", typed=b""):
        go, told = os.pipe()
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.read(go, 1)
            os.environ.update(TERM=term, PYTHONPATH=str(ROOT), COLUMNS="80", LINES="24")
            os.execv(sys.executable, [sys.executable, *map(str, arguments)])
        self.shown = b""
        self.type(typed)
        os.write(told, b".")
        os.close(go), os.close(told)

    def type(self, data):
        """Type bytes, as fast as the terminal takes them."""
        end = time.monotonic() + PATIENCE
        while data:
            assert time.monotonic() < end, f"{len(data)} bytes are not taken"
            readable, writable, _ = select.select([self.fd], [self.fd], [], 1)
            if readable:
                self._read()
            if writable:
                data = data[os.write(self.fd, data[:256]) :]

    def wait(self, pattern):
        """Wait until it shows what matches; return what came up to its end as text."""
        end = time.monotonic() + PATIENCE
        while (found := re.search(pattern.encode(), self.shown)) is None:
            assert time.monotonic() < end, (pattern, self.shown[-2000:])
            if select.select([self.fd], [], [], 0.2)[0] and not self._read():
                raise AssertionError((pattern, self.shown[-2000:]))
        text, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return text.decode()

    def close(self):
        """Wait for the end of the program; return its exit code."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if select.select([self.fd], [], [], 0.2)[0] and not self._read():
                break
        else:
            os.kill(self.pid, signal.SIGKILL)
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self):
        try:
            new = os.read(self.fd, 65536)
        except OSError:  # Linux says so where the program has gone
            return False
        self.shown += new
        return bool(new)
