"""A server: a model, its generation thread, and HTTP in front of it."""

from __future__ import annotations

import hmac
import threading
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from ..versions import package_version
from .document_routes import add_routes
from .documents import Documents
from .generation import Generation
from .handler import Handler
from .http import HttpServer
from .metrics import Metrics
from .options import ServeOptions
from .provider import Provider
from .snapshots import Snapshots
from .store import SnapshotStore, claim_folder

Route = Callable[[Handler, str], None]


class Server:
    """Serve a model.

    Other parts put their addresses in with :meth:`route`. A route is a function of the handler
    and of what follows its address; it reads a body with ``handler.read_body()``, answers with
    ``handler.send_json`` or ``handler.begin_events``, and raises ``ApiError`` for anything else.

    Args:
        provider (Provider): The model.
        options (ServeOptions): How it is set up.
        prompt_cache (Snapshots, optional): What is kept between requests. Default: ``None``, as
          the options say.

    Raises:
        OSError: If the address is taken.
        ValueError: If the folder of ``store`` can't be used.
    """

    def __init__(self, provider: Provider, options: ServeOptions, prompt_cache: Snapshots | None = None):
        if options.memory_limit is not None and (held := mx.get_active_memory()) >= options.memory_limit:
            told = f"the model alone takes {held / 1e9:.3g} GB but the limit is {options.memory_limit / 1e9:.3g} GB"
            raise ValueError(f"[serve] {told}. Raise --memory-limit.")
        self.options = options
        self.provider = provider
        self.name = provider.name
        self.created = int(time.time())
        self.fingerprint = f"mlx-dsa {package_version('mlx-dsa')}"
        self.metrics = Metrics()
        self._key = options.api_key.encode() if options.api_key else None
        self._routes: dict[tuple[str, str], Route] = {}
        self._thread: threading.Thread | None = None
        # Before the generation thread: an address that is taken must not leave one behind.
        self._http = HttpServer(
            options.host,
            options.port,
            lambda *arguments: Handler(self, *arguments),
            options.max_connections,
        )
        folder = None if options.store is None else Path(options.store)
        self._claimed = None if folder is None else claim_folder(folder)
        store = None if folder is None else SnapshotStore(folder / "snapshots", options.snapshot_bytes)
        snapshots = prompt_cache if prompt_cache is not None else Snapshots(options.snapshot_bytes, store)
        self.generation = generation = Generation(provider, snapshots, options, self.metrics)
        try:
            generation.call(lambda: snapshots.attach(provider.patch))
            kept_in = folder and folder / "documents"
            in_memory = options.snapshot_bytes if folder else None  # what is on disk can leave it
            documents = Documents(generation, snapshots, folder=kept_in, memory_bytes=in_memory, think=options.think)
            documents.attach()
            add_routes(self, documents)
            generation.documents = documents
        except BaseException:
            self.stop()
            raise

    @property
    def address(self) -> tuple[str, int]:
        """The address and port where it listens."""
        host, port = self._http.server_address[:2]
        return str(host), int(port)

    @property
    def url(self) -> str:
        """Where it listens, as a browser takes it."""
        host, port = self.address
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def route(self, method: str, path: str, function: Route) -> None:
        """Add an address.

        Args:
            method (str): ``"GET"``, ``"POST"`` or ``"DELETE"``.
            path (str): The address; one that ends in ``/`` is of everything below it.
            function (callable): Takes the handler and what follows the address.
        """
        self._routes[path, method] = function

    def find(self, path: str) -> tuple[str, dict[str, tuple[Route, str]]]:
        """Return what answers at an address.

        Args:
            path (str): Of a request, without its query.

        Returns:
            tuple: The route's own address, and by method its function and what follows.
        """
        known = {address for address, _ in self._routes}
        below = (a for a in known if a.endswith("/") and path.startswith(a) and len(path) > len(a))
        address = path if path in known else max(below, key=len, default="")
        rest = path[len(address) :]
        return address, {m: (f, rest) for (a, m), f in self._routes.items() if a == address}

    def admits(self, key: str | None) -> bool:
        """Return whether a request may ask, by the key it shows."""
        if self._key is None:
            return True
        return hmac.compare_digest((key or "").encode("latin-1", "replace"), self._key)

    def start(self) -> None:
        """Listen, in a thread of its own."""
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    def drain(self, timeout: float | None = None) -> bool:
        """Refuse new requests, and wait for the answers that are being written.

        Args:
            timeout (float, optional): Seconds to wait at most. Default: ``None``.

        Returns:
            bool: Whether all have been written.
        """
        return self.generation.drain(timeout)

    def stop(self) -> None:
        """End; what is in flight gets an error."""
        if self._thread is not None:
            self._http.shutdown()
            self._thread.join()
        self.generation.stop_and_join()
        self.generation.wait_until_told(2.0)
        self._http.close_connections(5.0)
        self._http.server_close()
        if self._claimed is not None:
            self._claimed.release()
