"""What other parts of the server bring, where they are there: snapshots, documents, the page."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import ServeOptions
from .plain_cache import PlainCache

if TYPE_CHECKING:
    from .server import Server


def part(name: str) -> Any:
    """Return a module of this package; ``None`` where there is none."""
    return import_module(f"{__package__}.{name}") if find_spec(f"{__package__}.{name}") else None


def make_prompt_cache(options: ServeOptions) -> Any:
    """Return what keeps states between requests.

    Args:
        options (ServeOptions): How the server is set up.
    """
    snapshots = part("snapshots")
    if snapshots is None:
        return PlainCache(max_size=64, max_bytes=options.snapshot_bytes)
    store = None
    if options.store is not None:
        store = part("store").SnapshotStore(Path(options.store) / "snapshots", options.snapshot_bytes)
    return snapshots.Snapshots(options.snapshot_bytes, store)


def add_documents(server: Server) -> Any:
    """Put documents and their addresses into a server.

    Args:
        server (Server): Its generation thread runs.

    Returns:
        The documents; ``None`` where that part is not there.

    Raises:
        ValueError: If the folder of ``--store`` can't be used.
    """
    snapshots, documents = server.generation.prompt_cache, part("documents")
    if documents is None or not hasattr(snapshots, "attach"):
        return None
    server.generation.call(lambda: snapshots.attach(server.provider.patch))
    options = server.options
    folder = None if options.store is None else Path(options.store) / "documents"
    made = documents.Documents(server.generation, snapshots, folder=folder, think=options.think)
    made.attach()
    part("document_routes").add_routes(server, made)
    return made
