"""The figures of one answer, and the line that tells them."""

from __future__ import annotations

from typing import Any, NamedTuple

from mlx_lm.generate import GenerationResponse
from mlx_lm.models.cache import KVCache

from ..cache import TieredKVCache


class Cold(NamedTuple):
    """What the cold store of a tiered cache costs.

    Args:
        token_bytes (int): Bytes of a token's cold entries, over all layers.
        recalled (float): Entries that a step brought back to a layer, on average
          over the conversation.
    """

    token_bytes: int
    recalled: float


class Report(NamedTuple):
    """What an answer took.

    Args:
        seen (int): Tokens that the cache has seen, over all turns.
        kept (tuple of int): Fewest and most entries that a layer keeps.
        kv_bytes (int): Bytes of the cache as allocated, index keys included.
        dense_bytes (int): Bytes that mlx-lm's own cache of every token seen
          would have allocated.
        prompt_tokens (int): Tokens of the prompt that this answer needed read.
        prompt_tps (float): Prompt tokens read a second.
        tokens (int): Tokens of the answer.
        generation_tps (float): Tokens of the answer a second.
        first (float, optional): Seconds to its first token.
        peak_memory (float): Peak memory of the process in GB.
        cold (Cold, optional): What a tiered cache cost.
    """

    seen: int
    kept: tuple[int, int]
    kv_bytes: int
    dense_bytes: int
    prompt_tokens: int
    prompt_tps: float
    tokens: int
    generation_tps: float
    first: float | None
    peak_memory: float
    cold: Cold | None = None


def measure(
    cache: list[Any], response: GenerationResponse | None, first: float | None
) -> Report:
    """Read the figures off a cache and the last response of mlx-lm.

    Args:
        cache (list): One cache a layer, which has seen at least a token.
        response (GenerationResponse, optional): ``None`` where the answer ended
          before its first token.
        first (float, optional): Seconds to the first token.

    Returns:
        Report: The figures.
    """
    layers = [layer for layer in cache if not layer.empty()]
    kept = [layer.size() for layer in layers] or [0]
    return Report(
        seen=max((layer.offset for layer in layers), default=0),
        kept=(min(kept), max(kept)),
        kv_bytes=sum(layer.nbytes for layer in layers),
        dense_bytes=sum(_dense_bytes(layer) for layer in layers),
        prompt_tokens=response.prompt_tokens if response else 0,
        prompt_tps=response.prompt_tps if response else 0.0,
        tokens=response.generation_tokens if response else 0,
        generation_tps=response.generation_tps if response else 0.0,
        first=first,
        peak_memory=response.peak_memory if response else 0.0,
        cold=_cold(layers),
    )


def describe(report: Report, *, dense: bool = False) -> str:
    """Return the line that follows an answer."""
    memory = f"KV {megabytes(report.kv_bytes)}"
    if not dense:
        memory += f" (dense {megabytes(report.dense_bytes)})"
    if report.cold is not None:
        memory += (
            f", cold {report.cold.token_bytes:,} B a token, "
            f"{report.cold.recalled:.1f} entries recalled a step and layer"
        )
    parts = [
        f"{report.seen:,} tokens seen",
        f"{entries(report)} entries kept a layer",
        memory,
    ]
    if report.first is None:
        return " · ".join([*parts, "stopped while reading"])
    speed = f"{report.generation_tps:,.1f} tokens/s"
    return " · ".join([*parts, speed, f"first token {report.first:.2f} s"])


def entries(report: Report) -> str:
    """Return the entries a layer keeps, a range where layers differ."""
    low, high = report.kept
    return f"{high:,}" if low == high else f"{low:,} to {high:,}"


def megabytes(count: int) -> str:
    """Return a number of bytes in MB (1e6 bytes)."""
    return f"{count / 1e6:,.1f} MB"


def _cold(layers: list[Any]) -> Cold | None:
    split = [c for c in layers if isinstance(c, TieredKVCache) and c.n_selections]
    if not split:
        return None
    selections = sum(c.n_selections for c in split)
    return Cold(
        sum(c.cold.token_nbytes for c in split),
        sum(c.recalled for c in split) / selections,
    )


def _dense_bytes(layer: Any) -> int:
    slots = -(-layer.offset // KVCache.step) * KVCache.step
    return slots * sum(
        part.shape[1] * part.shape[3] * part.dtype.size
        for part in (layer.keys, layer.values)
    )
