"""A page that shows a text with what a cache has kept of it: one file, without scripts."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..files import replacing

# Shades at most, beside that of what no layer keeps.
_SHADES = 8
# Of a text that has no sections of its own.
_PARTS = 10
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f]")
_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #16181d; --faint: #667085;
  --line: #d5d9e0; --shade: 37 99 235; }
body { margin: 0 auto; max-width: 52rem; padding: 1.5rem; background: var(--page);
  color: var(--ink); font: 1rem/1.65 system-ui, sans-serif; }
h1 { font-size: 1.4rem; line-height: 1.3; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 2rem 0 .5rem; border-top: 1px solid var(--line);
  padding-top: .8rem; overflow-wrap: anywhere; }
h2 small { font-weight: normal; color: var(--faint); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { text-align: right; padding: .15rem .7rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; min-width: 10rem; }
td a { color: inherit; }
.bar { min-width: 8rem; }
.bar i { display: block; height: .7rem; background: rgb(var(--shade) / .75); }
.legend { display: flex; flex-wrap: wrap; gap: .4rem 1rem; padding: 0; list-style: none; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; color: var(--faint); }
b { font-weight: inherit; color: var(--ink); border-radius: 2px; }
b, .bar i { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
section { content-visibility: auto; contain-intrinsic-size: auto 40rem; }
"""
_DARK = "--page: #14161a; --ink: #f2f4f7; --faint: #98a2b3; --line: #343a46; --shade: 59 120 246;"


class Share(NamedTuple):
    """How many layers keep each token, or how many key heads, where these keep their own.

    Args:
        counts (np.ndarray): Of each token ``[n]``, in the order of the text.
        n_layers (int): Layers that can drop a token.
        heads (int): Key heads of a layer that keep their own. Default: ``1``, the layer does.
    """

    counts: np.ndarray
    n_layers: int
    heads: int = 1

    @property
    def n_keepers(self) -> int:
        """By how many a token can be kept."""
        return self.n_layers * self.heads


def share_of(positions: Sequence[np.ndarray], n_tokens: int) -> Share:
    """Count by how many layers or key heads tokens are kept.

    Args:
        positions (sequence of np.ndarray): Of each layer the positions in the text that it
          keeps ``[size]``, or that each of its key heads does ``[heads, size]``.
        n_tokens (int): Tokens of the text.
    """
    counts = np.zeros(n_tokens, np.int64)
    layers = [np.atleast_2d(kept) for kept in positions]
    for kept in (row for layer in layers for row in layer):
        counts[np.unique(kept[kept < n_tokens])] += 1
    return Share(counts, len(layers), max((len(layer) for layer in layers), default=1))


def places_of(tokenizer: TokenizerWrapper, text: str) -> list[tuple[int, int]]:
    """Return where each token of a text begins and ends in it, in characters.

    Args:
        tokenizer (TokenizerWrapper): A tokenizer.
        text (str): The text.

    Raises:
        ValueError: If the tokenizer can't tell.
    """
    tell = tokenizer._tokenizer  # the wrapper passes no call on
    try:
        told = tell(text, add_special_tokens=False, return_offsets_mapping=True)
    except (NotImplementedError, TypeError):
        raise ValueError(
            "[report] this model's tokenizer can't tell where its tokens stand in a text. Leave --report out."
        ) from None
    return [tuple(place) for place in told["offset_mapping"]]


def write_page(
    path: str | os.PathLike,
    text: str,
    places: Sequence[tuple[int, int]],
    share: Share,
    sections: Sequence[tuple[str, int]],
    title: str,
    facts: Mapping[str, str],
) -> None:
    """Write the page, as a whole or not at all.

    Args:
        path (str or PathLike): The file; one that exists is replaced. Its folder is made.
        text (str): The text.
        places (sequence of tuple): From :func:`places_of`.
        share (Share): How many layers or key heads keep each of these tokens.
        sections (sequence of tuple): Name and first character of each, in order, the first
          at 0 and the last the text's own or what stands in its place.
        title (str): What was read.
        facts (Mapping): What else to tell: names to values.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part, part.open("w", encoding="utf-8") as file:
        file.writelines(_page(text, places, share, sections, title, facts))


def tenths(text: str) -> list[tuple[str, int]]:
    """Return sections for a text without any, about equally long.

    Args:
        text (str): The text.

    Returns:
        list of tuple: Name and first character of each: after a line or a word, if one ends
        near by.
    """
    length = len(text) / _PARTS
    sections = []
    for i in range(_PARTS):
        at = round(i * length)
        near = text[at : at + int(length / 4)] if i else ""
        at += (near.find("\n") if "\n" in near else near.find(" ")) + 1
        sections.append((f"Part {i + 1} of {_PARTS}", at))
    return sections


def _page(
    text: str,
    places: Sequence[tuple[int, int]],
    share: Share,
    sections: Sequence[tuple[str, int]],
    title: str,
    facts: Mapping[str, str],
) -> Iterator[str]:
    shades = min(share.n_keepers, _SHADES)
    levels = -(-share.counts * shades // share.n_keepers)
    nowhere, everywhere = ("in no layer", "in all") if share.heads == 1 else ("by no key head", "by all")
    keepers = "layers" if share.heads == 1 else "key heads"
    firsts = np.array([start for start, _ in places], np.int64)
    edges = [*np.searchsorted(firsts, [at for _, at in sections]), len(places)]
    title = html.escape(title)
    yield '<!doctype html>\n<html>\n<head>\n<meta charset="utf-8">\n'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    yield f"<title>{title}: what is kept</title>\n<style>{_STYLE}"
    for level in range(1, shades + 1):
        strength = 0.1 + 0.5 * level / shades
        yield f".k{level} {{ background: rgb(var(--shade) / {strength:.2f}); }}\n"
    yield f"@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}\n"
    yield f"</style>\n</head>\n<body>\n<h1>{title}: what is kept</h1>\n<table>\n"
    whole = _numbers(share, slice(None))
    for name, value in {**facts, f"kept {nowhere}": whole[1], f"{everywhere} {keepers}": whole[2]}.items():
        yield f"<tr><td>{html.escape(name)}<td>{html.escape(value)}\n"
    yield f"</table>\n{_legend(levels, shades, share)}\n"
    yield '<div class="wide"><table>\n<tr><th>Part<th>tokens<th>kept<th>'
    yield f"<th>{nowhere}<th>{everywhere}\n"
    for i, ((name, _), at) in enumerate(zip(sections, _slices(edges))):
        mean, none, every = _numbers(share, at)
        yield (
            f'<tr><td><a href="#s{i}">{html.escape(name)}</a><td>{at.stop - at.start:,}<td>{mean}'
            f'<td class="bar"><i style="width:{mean}"></i><td>{none}<td>{every}\n'
        )
    yield "</table></div>\n"
    runs = _runs(text, places, levels)
    ends = [at for _, at in sections[1:]] + [len(text)]
    start, level, end = next(runs, (0, 0, 0))
    for i, ((name, _), stop, at) in enumerate(zip(sections, ends, _slices(edges))):
        told = f"{_numbers(share, at)[0]} of {at.stop - at.start:,} tokens"
        yield f'<section id="s{i}">\n<h2>{html.escape(name)} <small>{told}</small></h2>\n'
        yield '<div class="text" dir="auto">'
        while start < stop and start < end:
            upto = min(end, stop)
            yield _shaded(text[start:upto], level)
            start = upto
            if start == end:
                start, level, end = next(runs, (end, 0, end))
        yield "</div>\n</section>\n"
    yield "</body>\n</html>\n"


def _slices(edges: Sequence[int]) -> list[slice]:
    return [slice(int(a), int(b)) for a, b in zip(edges, edges[1:])]


def _numbers(share: Share, at: slice) -> tuple[str, str, str]:
    """Return of some tokens the mean share that is kept, and what none and all keep."""
    counts = share.counts[at]
    n = max(1, len(counts))
    of = (counts.sum() / share.n_keepers, (counts == 0).sum(), (counts == share.n_keepers).sum())
    mean, by_none, by_all = (f"{100 * value / n:.1f}%" for value in of)
    return mean, by_none, by_all


def _legend(levels: np.ndarray, shades: int, share: Share) -> str:
    items, n = [], share.n_keepers
    keepers = f"{n} layers" if share.heads == 1 else f"{n} key heads, {share.heads} a layer,"
    for level in range(shades + 1):
        # The counts that are of this shade.
        low, high = n * (level - 1) // shades + 1, n * level // shades
        number = f"{low} to {high}" if 0 < low < high else f"{high}"
        tokens = 100 * (levels == level).mean() if len(levels) else 0.0
        mark = f'<b class="k{level}">&nbsp;text&nbsp;</b>' if level else "text"
        items.append(f'<li><span class="text">{mark}</span> {number}: {tokens:.1f}%')
    return (
        f"<p>The shade says how many of {keepers} keep a token; beside it the share "
        f'of tokens.</p>\n<ul class="legend">\n' + "\n".join(items) + "\n</ul>"
    )


def _shaded(text: str, level: int) -> str:
    text = html.escape(_CONTROL.sub(_picture, text), quote=False)
    return f"<b class=k{level}>{text}</b>" if level else text


def _picture(found: re.Match) -> str:
    """Return the character that stands for a control character."""
    return "\u2421" if found[0] == "\x7f" else chr(0x2400 + ord(found[0]))


def _runs(text: str, places: Sequence[tuple[int, int]], levels: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Yield stretches of one shade: first character, level, character after the last."""
    end = 0
    for level, pieces in groupby(_pieces(places, levels, len(text)), lambda piece: piece[0]):
        start = end
        *_, (_, end) = pieces
        yield start, level, end


def _pieces(places: Sequence[tuple[int, int]], levels: np.ndarray, length: int) -> Iterator[tuple[int, int]]:
    """Yield a level and where it ends for what is shown as a whole: a token, or all that a
    character is made of, which then has their mean. White space that is no token's goes
    with the one after it."""
    end = 0
    seen: list[int] = []
    for (_, stop), level in zip(places, levels.tolist()):
        if stop > end and seen:
            yield -(-sum(seen) // len(seen)), end
            seen = []
        end = max(end, stop)
        seen.append(level)
    if seen:
        yield -(-sum(seen) // len(seen)), length
