"""How a calibration is made, and what it reports: plain frozen records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..config import SparseConfig

_LEAST = {"sequences": 1, "sequence_length": 2, "chunk_size": 1, "top_k": 1, "n_sink": 0, "n_recent": 1}


@dataclass(frozen=True)
class CalibrateConfig:
    """Describe a calibration.

    Args:
        sequences (int): Sequences of text that are read. Default: ``16``.
        sequence_length (int): Tokens of one. Default: ``4096``.
        chunk_size (int): Tokens a chunk of the model's forward pass. Default: ``512``.
        top_k (int): Keys that a query will read; channels need none. Default: ``1024``.
        n_sink (int): First keys, always read. Default: ``4``.
        n_recent (int): Newest keys, likewise. Default: ``64``.
        density (float): Share of the keys that a query sees which it is to read, on the mean
          of all heads; for windows. Default: ``0.125``.

    Raises:
        ValueError: If a value is of the wrong type or out of range.
    """

    sequences: int = 16
    sequence_length: int = 4096
    chunk_size: int = 512
    top_k: int = 1024
    n_sink: int = SparseConfig.n_sink
    n_recent: int = SparseConfig.n_recent
    density: float = 0.125

    def __post_init__(self):
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"[CalibrateConfig] '{name}' must be a whole number of at least {least} but got {value!r}."
                )
        if not 0 < self.density <= 1:
            raise ValueError(f"[CalibrateConfig] 'density' must be above 0 and at most 1 but got {self.density!r}.")
        if self.top_k < self.n_sink + self.n_recent:
            raise ValueError(
                f"[CalibrateConfig] 'top_k' must be at least n_sink + n_recent = {self.n_sink + self.n_recent} "
                f"but got {self.top_k}."
            )


class CalibrateProgress(NamedTuple):
    """Say how far a calibration is.

    Args:
        done (int): Sequences read.
        total (int): Of so many.
        tokens (int): Tokens of these, those of earlier processes too.
        seconds (float): Since this process began.
    """

    done: int
    total: int
    tokens: int
    seconds: float


class CalibrateResult(NamedTuple):
    """Say what a calibration has made.

    Args:
        path (Path): The file.
        told (tuple of str): What was found, in lines for a reader.
        left_out (str): What of the text could not be read; empty where all could.
    """

    path: Path
    told: tuple[str, ...]
    left_out: str
