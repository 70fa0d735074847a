"""The figures of one answer, and the line that tells them."""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import Any, NamedTuple

import click
from mlx_lm.generate import GenerationResponse
from mlx_lm.models.cache import KVCache

_NO_BREAK = "\N{NO-BREAK SPACE}"
_CUTS = {
    "max_tokens": "Cut after {:,} tokens, as --max-tokens says.",
    "positions": "Cut after {:,} tokens: the model has no more positions.",
}


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
        cut (str, optional): What cut the answer: ``"max_tokens"``, or
          ``"positions"``, of which the model has no more.
        unread (int): Tokens of the prompt that were not read, since it was stopped.
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
    cut: str | None = None
    unread: int = 0


def measure(
    cache: list[Any],
    response: GenerationResponse | None,
    first: float | None,
    cut: str | None = None,
    unread: int = 0,
) -> Report:
    """Read the figures off a cache and the last response of mlx-lm.

    Args:
        cache (list): One cache a layer, which has seen at least a token.
        response (GenerationResponse, optional): ``None`` where the answer ended
          before its first token.
        first (float, optional): Seconds to the first token.
        cut (str, optional): As in :class:`Report`. Default: ``None``.
        unread (int): Likewise. Default: ``0``.

    Returns:
        Report: The figures.
    """
    layers = _with_entries(cache)
    kept = [layer.size() for layer in layers] or [0]
    return Report(
        seen=tokens_seen(cache),
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
        cut=cut,
        unread=unread,
    )


def tokens_seen(cache: list[Any]) -> int:
    """Return the tokens that a cache has seen, kept or not."""
    return max((layer.offset for layer in _with_entries(cache)), default=0)


def _with_entries(cache: list[Any]) -> list[Any]:
    # A layer without attention keeps a state of fixed size, and counts no tokens.
    return [c for c in cache if hasattr(c, "offset") and not c.empty()]


def describe(report: Report, *, dense: bool = False, width: int | None = None) -> str:
    """Return the line that follows an answer.

    Args:
        report (Report): The figures.
        dense (bool): Leave out what dense attention would need. Default: ``False``.
        width (int, optional): Characters that a terminal has room for: a line that
          is longer is broken between two figures. Default: ``None``, one line.
    """
    parts = _parts(report, dense)
    if width is None:
        return " · ".join(parts)
    figures = [part.replace(" ", _NO_BREAK).replace("," + _NO_BREAK, ", ") for part in parts]
    text = textwrap.fill(" · ".join(figures), width, break_long_words=False)
    return text.replace(_NO_BREAK, " ")


def _parts(report: Report, dense: bool) -> list[str]:
    memory = f"KV {megabytes(report.kv_bytes)}"
    if not dense:
        memory += f" (dense {megabytes(report.dense_bytes)})"
    parts = [
        f"{report.seen:,} tokens seen",
        f"{entries(report)} entries kept a layer",
        memory,
    ]
    if report.cold is not None:
        parts.append(
            f"cold {report.cold.token_bytes:,} B a token, {report.cold.recalled:.1f} entries recalled a step and layer"
        )
    if report.first is None:
        return [*parts, f"stopped while reading, {report.unread:,} tokens left"]
    speed = f"{report.generation_tps:,.1f} tokens/s"
    return [*parts, speed, f"first token {report.first:.2f} s"]


def show_report(report: Report, *, dense: bool) -> None:
    """Tell on standard error what an answer took, and what cut it."""
    width = shutil.get_terminal_size().columns if sys.stderr.isatty() else None
    if report.cut is not None:
        click.echo(_CUTS[report.cut].format(report.tokens), err=True)
    click.secho(describe(report, dense=dense, width=width), dim=True, err=True)


def entries(report: Report) -> str:
    """Return the entries a layer keeps, a range where layers differ."""
    low, high = report.kept
    return f"{high:,}" if low == high else f"{low:,} to {high:,}"


def megabytes(count: int) -> str:
    """Return a number of bytes in MB (1e6 bytes)."""
    return f"{count / 1e6:,.1f} MB"


def _cold(layers: list[Any]) -> Cold | None:
    split = [c for c in layers if getattr(c, "recalls", False) and c.n_selections]
    if not split:
        return None
    selections = sum(c.n_selections for c in split)
    return Cold(
        sum(c.cold.token_nbytes for c in split),
        sum(c.recalled for c in split) / selections,
    )


def _dense_bytes(layer: Any) -> int:
    slots = -(-layer.offset // KVCache.step) * KVCache.step
    return slots * sum(part.shape[1] * part.shape[3] * part.dtype.size for part in (layer.keys, layer.values))
