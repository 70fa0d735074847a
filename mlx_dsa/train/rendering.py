"""Rows as the text to learn from: a conversation is what the model's own template renders."""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

from ..texts import is_broken
from .chats import Chat, is_reply, read_row
from .report import Unusable

# Stands in a reply's place, to see what of the text is not the reply's.
_MARK = re.compile("\x02[0-9]+\x02")


class Piece(NamedTuple):
    """A row as text.

    Args:
        text (str): All of it.
        replies (list): The (start, end) of each reply whose place is known,
          ascending.
        is_chat (bool): Whether it is a conversation, which is kept whole.
    """

    text: str
    replies: list[tuple[int, int]]
    is_chat: bool


def render_row(tokenizer: Any, row: dict) -> Piece:
    """Return the text of a row, and where the replies are in it.

    Args:
        tokenizer: The tokenizer of ``mlx_lm.load``, or one of transformers; a
          conversation becomes what its ``apply_chat_template`` gives.
        row (dict): As for :func:`~mlx_dsa.train.chats.read_row`.

    Returns:
        Piece: The row.

    Raises:
        Unusable: If the row says nothing, or the template cannot render it.
    """
    said = read_row(row)
    if isinstance(said, str):
        ends = not said or said.endswith("\n")
        piece = Piece(said if ends else said + "\n\n", [], False)
    else:
        piece = _render_chat(tokenizer, said)
    if is_broken(piece.text):
        raise Unusable("with half a character (a lone surrogate)")
    return piece


def _render_chat(tokenizer: Any, chat: Chat) -> Piece:
    if not getattr(tokenizer, "has_chat_template", tokenizer.chat_template):
        raise Unusable("in a chat's form, and the model has no chat template")
    try:
        text = _render(tokenizer, chat)
    except Exception as error:  # a template raises what its author chose
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise Unusable("that the model's chat template cannot render", reason[0]) from None
    return Piece(text, _find_replies(tokenizer, chat, text), True)


def _render(tokenizer: Any, chat: Chat) -> str:
    tools = {"tools": chat.tools} if chat.tools else {}
    return tokenizer.apply_chat_template(chat.messages, tokenize=False, **tools)


def _find_replies(tokenizer: Any, chat: Chat, text: str) -> list[tuple[int, int]]:
    """Return where the replies are in a text, with the reasoning and the calls in them.

    The text is compared with what the template makes of marks in their places. It may
    strip, reorder or leave out replies, and put more around them than around marks.
    """
    for keep in (False, True):  # the answer of a tool may need the call before it: keep calls
        messages = [
            {**(m if keep else {}), "role": m["role"], "content": f"\x02{i}\x02"} if is_reply(m) else m
            for i, m in enumerate(chat.messages)
        ]
        try:
            marked = _render(tokenizer, chat._replace(messages=messages))
        except Exception:  # a template raises what its author chose
            continue
        return _align(text, _MARK.split(marked))
    return []


def _align(text: str, around: list[str]) -> list[tuple[int, int]]:
    """Find in a text what stands between these parts; nothing where that is not clear."""
    first, *parts = around
    start = _common(first, text)
    if 2 * start < len(first):
        return []
    places = []
    for part in parts[:-1]:
        found = _find(part, text, start)
        if found is None:
            return []
        places.append((start, found[0]))
        start = found[1]
    for last in parts[-1:]:
        places.append((start, len(text) - _common(last[::-1], text[start:][::-1])))
    return [place for place in places if place[0] < place[1]]


def _find(part: str, text: str, start: int) -> tuple[int, int] | None:
    """Find a part in a text: a half of it, and as much around that as is alike.

    The rest may be what the template puts about a mark only, such as a block of reasoning
    that is empty.
    """
    half = (len(part) + 1) // 2
    for begin in (half // 2, 0, len(part) - half):
        end = begin + half
        at = text.find(part[begin:end], start)
        if at >= 0:
            before = _common(part[:begin][::-1], text[start:at][::-1])
            after = _common(part[end:], text[at + half :])
            return at - before, at + half + after
    return None


def _common(a: str, b: str) -> int:
    """Return how many characters two texts begin with alike."""
    return len(os.path.commonprefix([a, b]))
