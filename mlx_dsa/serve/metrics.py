"""Counts of what a server does, as Prometheus reads them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_COUNTERS = {
    "tokens_prompt": "Tokens of prompts.",
    "tokens_cached": "Tokens of prompts that were not read again.",
    "tokens_read": "Tokens of prompts that were read.",
    "tokens_generated": "Tokens of answers.",
    "requests_cancelled": "Requests whose client went away.",
    "requests_refused": "Requests refused since the queue or the memory was full.",
    "failures": "Failures of the generation that were answered with an error.",
}
_GAUGES = {
    "queue_length": "Requests that wait.",
    "rows_reading": "Prompts that are read now.",
    "rows_decoding": "Answers that are written now.",
    "entries_kept": "Cache entries that the rows keep, over layers.",
    "kv_bytes": "Bytes of the caches of all rows.",
    "snapshot_bytes": "Bytes of what is kept between requests.",
    "snapshots": "States kept between requests.",
    "memory_bytes": "Bytes that MLX holds.",
}


class Metrics:
    """Counters, and the seconds to first tokens; any thread may count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._first: list[int] = [0] * (len(_SECONDS) + 1)
        self._first_sum = 0.0

    def count(self, name: str, n: int = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self._counts[name] += n

    def request(self, endpoint: str, status: int) -> None:
        """Count a request that was answered."""
        with self._lock:
            self._requests[endpoint, status] += 1

    def first_token(self, seconds: float) -> None:
        """Count how long a first token took, from the request's admission."""
        with self._lock:
            self._first_sum += seconds
            for i, bound in enumerate(_SECONDS):
                if seconds <= bound:
                    self._first[i] += 1
            self._first[-1] += 1

    def __getitem__(self, name: str) -> int:
        with self._lock:
            return self._counts[name]

    def text(self, gauges: Mapping[str, float]) -> str:
        """Return everything in Prometheus' text format.

        Args:
            gauges (Mapping): What there is now, by name.
        """
        with self._lock:
            lines = _head("requests_total", "Requests by endpoint and status.", "counter")
            for (endpoint, status), n in sorted(self._requests.items()):
                lines.append(f'mlx_dsa_requests_total{{endpoint="{endpoint}",status="{status}"}} {n}')
            for name, told in _COUNTERS.items():
                lines += _head(f"{name}_total", told, "counter")
                lines.append(f"mlx_dsa_{name}_total {self._counts[name]}")
            for name, told in _GAUGES.items():
                lines += _head(name, told, "gauge")
                lines.append(f"mlx_dsa_{name} {gauges.get(name, 0)}")
            name = "first_token_seconds"
            lines += _head(name, "Seconds from a request to its first token.", "histogram")
            for bound, n in zip((*_SECONDS, "+Inf"), self._first):
                lines.append(f'mlx_dsa_{name}_bucket{{le="{bound}"}} {n}')
            lines.append(f"mlx_dsa_{name}_sum {self._first_sum:.6f}")
            lines.append(f"mlx_dsa_{name}_count {self._first[-1]}")
        return "\n".join(lines) + "\n"


def _head(name: str, told: str, kind: str) -> list[str]:
    return [f"# HELP mlx_dsa_{name} {told}", f"# TYPE mlx_dsa_{name} {kind}"]
