"""A long text half read, in a file from which the same reading goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from . import __version__, blas
from .maker import maker_of
from .patch import SparsePatch
from .saved import PART, pack_caches, unpack_caches
from .sealed import Damaged, NotSealed, read_sealed, write_sealed
from .versions import package_version

_FORMAT = f"{PART} 3"
# Reading takes this many times as long as writing what was read, where nothing else is asked.
_TIMES = 25


class Left(NamedTuple):
    """What an earlier run has left.

    Args:
        caches (list): One cache a layer, as they were after ``done`` tokens.
        text (str): The text that is being read.
        done (int): Its tokens that were read.
    """

    caches: list[Any]
    text: str
    done: int


class UnfinishedReading:
    """The part file of one reading, written between two calls of the model.

    The file is there as a whole or not at all. Whoever goes on from it does so with the
    same model, indexers, settings, device and versions, so that the result is the same
    bits; what differs is refused.

    Args:
        path (str or PathLike): The part file.
        patch (SparsePatch): The patch of the model that reads.
        identity (Mapping): What else must be the same: what it is, to a string.
        every (float, optional): Seconds from one writing to the next at least. Default:
          ``None``: after every call, or as seldom as makes writing 1/25 of the time.

    Attributes:
        done (int): Tokens that the file holds.
        seconds (float): How long all runs have been reading so far.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        patch: SparsePatch,
        identity: Mapping[str, str],
        every: float | None = None,
    ):
        self.path = Path(path)
        self.done = 0
        self._patch = patch
        self._identity = {
            **identity,
            **_flat(maker_of(patch)),
            **json.loads(json.dumps(dataclasses.asdict(patch.config))),
            "device": str(mx.default_device()),
            "BLAS": "OpenBLAS" if blas.is_loaded() else "MLX's own",
            "version of mlx-dsa": __version__,
            "version of mlx": package_version("mlx"),
        }
        self._every = every
        self._tokens = ""  # a digest of them
        self._text = mx.array([], mx.uint8)
        self._before = 0.0  # seconds of earlier runs
        self._began = self._written = time.perf_counter()
        self._took = 0.0

    def check(self):
        """Look whether there is a file to go on from, and set ``done``.

        Raises:
            ValueError: If the file is damaged, or of another reading.
        """
        if os.path.lexists(self.path):
            header = self._read()[1]
            self.done, self._before = int(header["done"]), float(header["seconds"])
            self._tokens = header["tokens"]

    def load(self) -> Left | None:
        """Take up what an earlier run has left, as :meth:`check` has found.

        Returns:
            Left, optional: It, or ``None`` where there is nothing.

        Raises:
            ValueError: If the file has been changed in the meantime.
        """
        if not self.done:
            return None
        arrays, header = self._read()
        text = np.array(arrays["text"]).tobytes().decode()
        caches = unpack_caches(arrays, header)
        self._patch.adopt(caches)
        return Left(caches, text, int(header["done"]))

    def _read(self) -> tuple[dict[str, mx.array], dict[str, str]]:
        try:
            arrays, header = read_sealed(self.path)
        except (NotSealed, Damaged):
            arrays, header = {}, {}
        except OSError as error:
            raise ValueError(f"[compress] {self.path} can't be read: {error.strerror}.") from None
        if header.get("format") != _FORMAT:
            raise ValueError(
                f"[compress] {self.path} is damaged, or no part file of this version. Delete it to begin anew."
            )
        stored = json.loads(header["identity"])
        for name in {**self._identity, **stored}:
            if stored.get(name) != self._identity.get(name):
                raise ValueError(
                    f"[compress] {self.path} is half read with another {name}"
                    f"{_told(stored.get(name), self._identity.get(name))}. Go on with what "
                    f"that began with, name another file, or delete it."
                )
        return arrays, header

    def begin(self, text: str, tokens: Sequence[int]):
        """Say what is read; time counts from here.

        Args:
            text (str): The whole text.
            tokens (sequence of int): Its tokens.

        Raises:
            ValueError: If what was loaded had other tokens.
        """
        digest = hashlib.sha256(np.array(tokens, np.int64).tobytes()).hexdigest()
        if self._tokens not in ("", digest):
            raise ValueError(
                f"[compress] {self.path} is half read with another tokenizer. Go on with what "
                f"that began with, name another file, or delete it."
            )
        self._tokens = digest
        self._text = mx.array(np.frombuffer(text.encode(), np.uint8))
        self._began = self._written = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._began

    def keep(self, caches: Sequence[Any], done: int, now: bool = False):
        """Write what is read, where it is time to.

        Args:
            caches (Sequence): One cache a layer.
            done (int): Tokens that they have seen.
            now (bool): It is time to. Default: ``False``.

        Raises:
            ValueError: If it can't be written; the file stays as it was.
        """
        start = time.perf_counter()
        wait = _TIMES * self._took if self._every is None else self._every
        if done == self.done or not now and start - self._written < wait:
            return
        arrays, packed = pack_caches(caches, "compress")
        header = {
            "format": _FORMAT,
            "identity": json.dumps(self._identity),
            "tokens": self._tokens,
            "done": str(done),
            "seconds": str(self.seconds),
            **packed,
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # A power failure is not worth waiting for the disk each time: the checksum tells.
            write_sealed(self.path, {**arrays, "text": self._text}, header, durable=False)
        except (OSError, RuntimeError) as error:
            reason = str(getattr(error, "strerror", None) or error).rstrip(".")
            raise ValueError(
                f"[compress] {self.path} can't be written: {reason}. Free some space, and run "
                f"the same command again; {self.done:,} tokens are kept."
            ) from None
        self.done = done
        self._written = time.perf_counter()
        self._took = self._written - start

    def remove(self):
        """Delete the file: the reading is over."""
        self.path.unlink(missing_ok=True)


def _flat(maker: Mapping[str, Any]) -> dict[str, Any]:
    """Return what makes keys and values, what tells models apart by name first."""
    prints = {f"{of} ({what})": digits for of in ("model", "indexer") for what, digits in maker[of].items()}
    return {**maker["settings"], **prints}


def _told(then: Any, now: Any) -> str:
    """Return two values that tell something to a reader."""
    texts = [str(value) for value in (then, now)]
    return f": {texts[0]}, not {texts[1]}" if max(map(len, texts)) <= 40 else ""
