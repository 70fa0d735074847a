"""What a row says: running text, or a conversation in one of the forms that people have."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from .report import Unusable

_TEXT_PARTS = ("text", "input_text", "output_text")
# What a reply may consist of besides its content.
_OTHER_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


class Chat(NamedTuple):
    """A conversation, as chat templates take it.

    Args:
        messages (list of dict): Each with a ``"role"`` and its ``"content"``, a
          string; no value is ``None``.
        tools (list of dict, optional): What the model may call.
    """

    messages: list[dict]
    tools: list[dict] | None


def read_row(row: dict) -> str | Chat:
    """Return the text or the conversation of a row.

    Args:
        row (dict): With ``"messages"``, ``"prompt"`` and ``"completion"``, or
          ``"text"``; the former go before the latter. ``"tools"`` may stand
          beside a conversation. A content may be a list of parts.

    Returns:
        str or Chat: What the row says.

    Raises:
        Unusable: If it says nothing, or nothing that can be learnt from.
    """
    if row.get("messages"):
        return _chat(row["messages"], row)
    if row.get("prompt") is not None and row.get("completion") is not None:
        turns = _turns("user", row["prompt"]) + _turns("assistant", row["completion"])
        return _chat(turns, row)
    text = row.get("text")
    if isinstance(text, str):
        return text
    if text is not None:
        raise Unusable("whose text is not a string", f"a {type(text).__name__}")
    if row.get("prompt") is not None:
        raise Unusable("without a completion")
    keys = ", ".join(repr(key) for key, value in row.items() if value is not None)
    raise Unusable("without text, messages, or prompt and completion", keys)


def is_reply(message: dict) -> bool:
    """Tell whether a message is the assistant's and says something."""
    said = message["content"].strip() or any(message.get(k) for k in _OTHER_CONTENT)
    return message["role"] == "assistant" and bool(said)


def _turns(role: str, said: Any) -> list:
    """Return one side of a row of two: a content, or messages."""
    is_messages = isinstance(said, list) and any(isinstance(m, dict) and "role" in m for m in said)
    return said if is_messages else [{"role": role, "content": said}]


def _chat(messages: Any, row: dict) -> Chat:
    if not isinstance(messages, list):
        raise Unusable("whose messages are not a list")
    chat = Chat([_message(m) for m in messages], _tools(row.get("tools")))
    if not any(map(is_reply, chat.messages)):
        raise Unusable("without a reply of the assistant")
    return chat


def _message(given: Any) -> dict:
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        raise Unusable("with a message that has no role")
    # Datasets fill what a message lacks with None, which templates take for a value.
    message = {key: value for key, value in given.items() if value is not None}
    message["content"] = _content(message)
    _check_calls(message.get("tool_calls", []))
    return message


def _content(message: dict) -> str:
    content = message.get("content")
    if content is None and message["role"] in ("assistant", "tool"):
        return ""
    if content is None:
        raise Unusable("with a question or an instruction that has no content")
    if not isinstance(content, list):
        content = [content]
    return "".join(map(_part, content))


def _part(part: Any) -> str:
    """Return the text of a content, or of a part of one."""
    text = part
    if isinstance(part, dict) and part.get("type", "text") in _TEXT_PARTS:
        text = part.get("text")
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, dict) else None
        raise Unusable("with a content that is not text", f"a {kind or type(part).__name__}")
    return text


def _check_calls(calls: Any):
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Unusable("with a tool call that names no function")


def _tools(tools: Any) -> list[dict] | None:
    if isinstance(tools, str):  # a dataset's columns have one type, so some hold JSON
        try:
            tools = json.loads(tools)
        except ValueError:
            raise Unusable("whose tools are not a list") from None
    if tools and not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
        raise Unusable("whose tools are not a list")
    return tools or None
