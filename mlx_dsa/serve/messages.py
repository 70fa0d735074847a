"""The messages and tools of a chat, checked part by part."""

from __future__ import annotations

import json
from typing import Any

from .errors import bad

_ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXTS = ("name", "tool_call_id", "reasoning_content", "reasoning")
_MOST_MESSAGES = 10_000
_MOST_TOOLS = 128


def check_messages(value: Any) -> list[dict[str, Any]]:
    """Return messages as a chat template takes them.

    Args:
        value: What the body says.

    Returns:
        list: Messages with ``role``, ``content`` as one text, and what else is known of them.

    Raises:
        ApiError: If they are not valid, or have parts that are no text.
    """
    if not isinstance(value, list) or not value or len(value) > _MOST_MESSAGES:
        raise bad(f"'messages' must be a list of 1 to {_MOST_MESSAGES} messages.")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise bad(f"'{where}' must be an object.")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise bad(f"'{where}.role' must be one of {', '.join(_ROLES)}.")
    calls = message.get("tool_calls")
    content = _content(message.get("content"), f"{where}.content")
    if content is None and not (role == "assistant" and calls):
        raise bad(f"'{where}.content' must be a text.")
    checked: dict[str, Any] = {"role": "system" if role == "developer" else role, "content": content or ""}
    for key in _TEXTS:
        if message.get(key) is None:
            continue
        if not isinstance(message[key], str):
            raise bad(f"'{where}.{key}' must be a text.")
        checked[key] = message[key]
    if calls is not None:
        checked["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls")
    return checked


def _content(value: Any, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise bad(f"'{where}' must be a text, or a list of parts that are texts.")
    texts = []
    for part in value:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise bad(f"'{where}' must have parts with a type.")
        if part["type"] != "text":
            raise bad(f"'{where}' has a part of type {part['type'][:40]!r}: only text is read here.", "unsupported")
        if not isinstance(part.get("text"), str):
            raise bad(f"'{where}' must have parts with a text.")
        texts.append(part["text"])
    return "".join(texts)


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or len(value) > _MOST_TOOLS:
        raise bad(f"'{where}' must be a list of up to {_MOST_TOOLS} calls.")
    calls = []
    for call in value:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise bad(f"'{where}' must have calls of functions with a name.")
        if not isinstance(call.get("id", ""), str):
            raise bad(f"'{where}' must have calls whose id is a text.")
        arguments = _arguments(function.get("arguments"), where)
        calls.append(
            {
                "id": call.get("id", ""),
                "type": "function",
                "function": {"name": function["name"], "arguments": arguments},
            }
        )
    return calls


def _arguments(value: Any, where: str) -> Any:
    """Return the arguments of a call as an object, which templates write out themselves."""
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise bad(f"'{where}' must have calls whose arguments are JSON.") from None
    if value in (None, ""):
        return {}
    if not isinstance(value, dict):
        raise bad(f"'{where}' must have calls whose arguments are an object.")
    return value


def check_tools(value: Any) -> list[dict[str, Any]] | None:
    """Return the tools of a chat; ``None`` without any.

    Args:
        value: What the body says.

    Raises:
        ApiError: If they are not valid.
    """
    if value is None or value == []:
        return None
    if not isinstance(value, list) or len(value) > _MOST_TOOLS:
        raise bad(f"'tools' must be a list of up to {_MOST_TOOLS} tools.")
    for i, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type", "function") != "function":
            raise bad(f"'tools[{i}]' must be a function.")
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise bad(f"'tools[{i}].function.name' must be a text.")
        if not isinstance(function.get("description", ""), (str, type(None))):
            raise bad(f"'tools[{i}].function.description' must be a text.")
        if not isinstance(function.get("parameters", {}), (dict, type(None))):
            raise bad(f"'tools[{i}].function.parameters' must be an object.")
    return value
