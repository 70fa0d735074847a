"""Snapshots of conversations on disk, for the time after a restart."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Full, Queue
from typing import Any

import mlx.core as mx
import numpy as np

from ..files import HeldFile, is_part
from ..maker import maker_of
from ..patch import SparsePatch
from ..saved import load_cache, pack_saved, peek_saved, write_saved

KIND = "kind"  # in a file's metadata: what the file is of
_SNAPSHOT = "snapshot"
# Snapshots that wait for the disk; each is as large as a cache, and none is needed.
_WAITING = 2


def claim_folder(folder: Path) -> HeldFile:
    """Make a server's folder, and keep other servers out of it until that is released.

    Raises:
        ValueError: If it can't be made, or another server has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return HeldFile(folder / ".in use", b"mlx-dsa serve\n")
    except BlockingIOError:
        told = f"another server keeps its states in {folder}"
    except OSError as error:
        told = f"{folder} can't be used: {error.strerror}"
    raise ValueError(f"[serve] {told}. Name another folder with --store.")


@dataclass(eq=False)
class Stored:
    """A snapshot on disk.

    Args:
        path (Path): Its file.
        tokens (np.ndarray): The tokens that were read; of a document the first is 0.
        document (str): The document that it begins with, or ``""``.
        nbytes (int): Of the file.
        used (float): When it was written or asked for.
    """

    path: Path
    tokens: np.ndarray
    document: str
    nbytes: int
    used: float


class SnapshotStore:
    """Keep snapshots in a folder, those least recently used go.

    What is written is what a prune leaves: ``top_k`` entries a layer, 0.3 GB for Qwen3-8B with 2,048.
    The model's thread does the prune, which a step of decode does too, and at most a copy; the
    checksum and the disk are another thread's. On two busy CPU cores the copy took 0.8 s and the
    writing 2.5 s, during which steps were no slower than other work on the machine makes them. Where
    the disk is slower than answers come, snapshots are not written.

    Args:
        folder (Path): Where the files are; it is made. What in it is damaged, or not of this
          model and these settings, is left as it is.
        max_bytes (int): Bytes of its files that may be there.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self.folder = folder
        self.max_bytes = max_bytes
        self._patch: SparsePatch | None = None
        self.maker: Mapping[str, Any] = {}
        self._stored: dict[Path, Stored] = {}
        self._lock = threading.Lock()
        self._queue: Queue[tuple[Stored, Any] | None] = Queue(_WAITING)
        self._thread: threading.Thread | None = None
        self._pending: set[Path] = set()
        self._forgotten: set[str] = set()  # documents; what is being written of them must go, too

    def attach(self, patch: SparsePatch):
        """Look what is there for a model, in its thread.

        Args:
            patch (SparsePatch): Of the model.

        Raises:
            ValueError: If there can't be such a folder.
        """
        self._patch, self.maker = patch, maker_of(patch)
        for path, metadata in saved_in(self.folder, patch, self.maker, _SNAPSHOT):
            with suppress(OSError, KeyError, ValueError):
                tokens = unpacked(metadata["read"])
                about = path.stat()
                self._stored[path] = Stored(path, tokens, metadata["document"], about.st_size, about.st_mtime)
        self._shrink()
        self._thread = threading.Thread(target=self._write, name="mlx-dsa snapshots", daemon=True)
        self._thread.start()

    def all(self) -> list[Stored]:
        """Return what is there."""
        with self._lock:
            return list(self._stored.values())

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for stored in self.all())

    def load(self, stored: Stored) -> list[Any] | None:
        """Load a snapshot, in the model's thread.

        Args:
            stored (Stored): From :meth:`all`.

        Returns:
            list, optional: One cache a layer; ``None`` where the file is damaged or gone, which
            is told in one line.
        """
        assert self._patch is not None
        try:
            caches = load_cache(stored.path, self._patch, self.maker).caches
        except ValueError as error:
            logging.warning(f"{error} It is ignored.")
            with self._lock:
                self._stored.pop(stored.path, None)
            return None
        with suppress(OSError):
            os.utime(stored.path)
            stored.used = stored.path.stat().st_mtime
        return caches

    def has(self, tokens: np.ndarray, document: str) -> bool:
        """Return whether a snapshot is there, or waits to be written."""
        path = self._path(tokens, document)
        return path in self._stored or path in self._pending

    def save(self, tokens: np.ndarray, document: str, caches: Sequence[Any]):
        """Write a snapshot soon, from the model's thread.

        Args:
            tokens (np.ndarray): What was read; of a document the first is 0.
            document (str): As in :class:`Stored`.
            caches (Sequence): One cache a layer, which nobody else has; pruned here.
        """
        assert self._patch is not None
        path = self._path(tokens, document)
        metadata = {KIND: _SNAPSHOT, "read": packed(tokens), "document": document}
        self._patch.prune(caches)
        try:
            arrays, header = pack_saved(caches, self._patch, metadata, self.maker)
        except ValueError as error:  # of two tiers, say
            logging.warning(f"{error} Conversations are not kept on disk.")
            self.max_bytes = 0
            return
        arrays = {name: mx.contiguous(array) for name, array in arrays.items()}
        mx.eval(arrays)  # another thread writes them
        nbytes = sum(array.nbytes for array in arrays.values())
        if nbytes > self.max_bytes:
            return
        with suppress(Full):
            self._forgotten.discard(document)
            self._queue.put_nowait((Stored(path, tokens, document, nbytes, 0.0), (arrays, header)))
            self._pending.add(path)

    def forget(self, document: str):
        """Delete what begins with a document."""
        self._forgotten.add(document)
        for stored in self.all():
            if stored.document == document:
                self._remove(stored)

    def close(self):
        """Wait for what is being written."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _path(self, tokens: np.ndarray, document: str) -> Path:
        assert self._patch is not None
        return self.folder / f"{name_of(self.maker, repr(self._patch.config), document, tokens.tobytes())}.safetensors"

    def _write(self):
        while (item := self._queue.get()) is not None:
            stored, content = item
            try:
                write_saved(stored.path, *content)
                about = stored.path.stat()
                stored.nbytes, stored.used = about.st_size, about.st_mtime
                with self._lock:
                    self._stored[stored.path] = stored
                if stored.document in self._forgotten:
                    self._remove(stored)
                self._shrink()
            # Whatever it is: a thread that ends would hold up the server's end.
            except Exception as error:
                logging.warning(f"{error} A conversation is not kept on disk.")
            finally:
                self._pending.discard(stored.path)
                del content, item

    def _shrink(self):
        there = sorted(self.all(), key=lambda stored: stored.used)
        left = sum(stored.nbytes for stored in there)
        for stored in there:
            if left <= self.max_bytes:
                break
            left -= stored.nbytes
            self._remove(stored)

    def _remove(self, stored: Stored):
        with self._lock:
            self._stored.pop(stored.path, None)
        with suppress(OSError):
            stored.path.unlink(missing_ok=True)


def saved_in(
    folder: Path, patch: SparsePatch, maker: Mapping[str, Any], kind: str
) -> Iterator[tuple[Path, dict[str, str]]]:
    """Find the files of a folder that fit a model; of each other one a line is logged.

    Args:
        folder (Path): The folder; it is made.
        patch (SparsePatch): Of the model.
        maker (Mapping): ``maker_of(patch)``.
        kind (str): What the files are of.

    Yields:
        tuple: A file, and its metadata, of which no checksum is verified yet.

    Raises:
        ValueError: If there can't be such a folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = sorted(folder.glob("*.safetensors"))
    except OSError as error:
        raise ValueError(f"{folder} can't be used: {error.strerror}. Name another folder with --store.") from None
    for path in paths:
        if is_part(path.name):  # being written, or left by a process that was killed
            continue
        try:
            metadata = peek_saved(path, patch, maker)
            if metadata.get(KIND) != kind:
                raise ValueError(f"{path} is not of a {kind}.")
        except ValueError as error:
            logging.warning(f"{error} It is ignored.")
            continue
        yield path, metadata


def name_of(maker: Mapping[str, Any], *parts: str | bytes) -> str:
    """Return a file's name for what a model has read: 32 hexadecimal digits.

    Args:
        maker (Mapping): ``maker_of(patch)``.
        *parts (str or bytes): What else tells it apart, such as settings.
    """
    digest = hashlib.sha256(json.dumps(maker, sort_keys=True).encode())
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]


def packed(tokens: np.ndarray) -> str:
    """Return tokens for a header."""
    return base64.b64encode(tokens.astype("<i4").tobytes()).decode()


def unpacked(text: str) -> np.ndarray:
    """Return the tokens in a header."""
    return np.frombuffer(base64.b64decode(text, validate=True), "<i4").astype(np.int32)
