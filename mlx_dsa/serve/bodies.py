"""What a request's body says, checked before anything is done with it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.server import (
    GenerationArguments,
    LogitsProcessorArguments,
    ModelDescription,
    SamplingArguments,
)

from .errors import ApiError, bad
from .messages import check_messages, check_tools
from .options import ServeOptions

_MOST_DEPTH = 64
_LEAST_TEMP = 1e-3  # log-probabilities over less than that leave the range of float16
_MOST = 2**31 - 1
_NUMBERS = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0, 100),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 0.5),
}
_INTEGERS = {
    "top_k": (0, _MOST),
    "max_tokens": (1, _MOST),
    "max_completion_tokens": (1, _MOST),
    "repetition_context_size": (0, _MOST),
    "presence_context_size": (0, _MOST),
    "frequency_context_size": (0, _MOST),
    "num_draft_tokens": (0, _MOST),
    "seed": (-(2**63), 2**64 - 1),
    "n": (1, _MOST),
    "best_of": (1, _MOST),
}
_FLAGS = ("stream", "return_progress", "echo")
_MOST_TOP = 20
_TEMPLATE_OWN = {
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "tokenizer_kwargs", "return_assistant_tokens_mask", "load_audio_from_video",
}  # fmt: skip


@dataclass
class Asked:
    """A request for an answer, checked.

    Args:
        kind (str): ``"chat"`` or ``"text"``.
        arguments (GenerationArguments): How it is sampled, where it ends, what is told of each token.
        stream, include_usage, return_progress (bool): How it is told.
        document (str, optional): A document that it is about.
        messages (list), tools (list, optional): Of a chat.
        prompt (str), tokens (list of int, optional): Of a completion: its text, or its tokens.
    """

    kind: str
    arguments: GenerationArguments
    stream: bool = False
    include_usage: bool = False
    return_progress: bool = False
    document: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    prompt: str = ""
    tokens: list[int] | None = None


def parse(raw: bytes) -> dict[str, Any]:
    """Read a body of JSON.

    Args:
        raw (bytes): The body.

    Returns:
        dict: Its object: finite numbers, whole characters, and bounded depth.

    Raises:
        ApiError: If it is something else.
    """
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise bad("The body is not UTF-8.") from None
    except RecursionError:
        raise bad("The body's JSON is nested too deeply.") from None
    except ValueError as error:
        raise bad(f"The body is not JSON: {str(error)[:200]}.") from None
    if not isinstance(body, dict):
        raise bad("The body must be a JSON object.")
    _walk(body)
    return body


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _walk(body: dict[str, Any]) -> None:
    todo: list[tuple[Any, int]] = [(body, 1)]
    while todo:
        value, depth = todo.pop()
        if depth > _MOST_DEPTH:
            raise bad("The body's JSON is nested too deeply.")
        if isinstance(value, dict):
            todo += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, list):
            todo += [(part, depth + 1) for part in value]
        elif isinstance(value, str):
            _check_text(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise bad("The body has a number that is too large.")


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise bad("The body has half a character (a lone surrogate).") from None


def read(kind: str, body: dict[str, Any], options: ServeOptions, name: str, vocab_size: int) -> Asked:
    """Check what is asked.

    Args:
        kind (str): ``"chat"`` or ``"text"``.
        body (dict): From :func:`parse`.
        options (ServeOptions): What holds where the body says nothing.
        name (str): The model that is served.
        vocab_size (int): Tokens that it knows.

    Returns:
        Asked: What is asked.

    Raises:
        ApiError: If a value is not valid, or asks for what there isn't.
    """
    body = {key: value for key, value in body.items() if value is not None}
    check_model(body.get("model", ""), name)
    for key, (low, high) in _NUMBERS.items():
        _check_number(body, key, low, high, (int, float))
    for key, (low, high) in _INTEGERS.items():
        _check_number(body, key, low, high, (int,))
    for key in _FLAGS:
        if not isinstance(body.get(key, False), bool):
            raise bad(f"'{key}' must be true or false.")
    _refuse_unsupported(body)
    arguments = _arguments(kind, body, options, name, vocab_size)
    document = body.get("document")
    if document is not None and not isinstance(document, str):
        raise bad("'document' must be the id of a document, a string.")
    asked = Asked(
        kind,
        arguments,
        stream=body.get("stream", False),
        include_usage=_include_usage(body),
        return_progress=body.get("return_progress", False),
        document=document,
    )
    if kind == "chat":
        asked.messages = check_messages(body.get("messages"))
        asked.tools = None if body.get("tool_choice") == "none" else check_tools(body.get("tools"))
    else:
        asked.prompt, asked.tokens = _prompt(body.get("prompt"), vocab_size)
    return asked


def check_model(asked: Any, name: str) -> None:
    """Refuse a model that is not the one that is served.

    Args:
        asked: What the body says.
        name (str): The model that is served.

    Raises:
        ApiError: 404 for another model.
    """
    if not isinstance(asked, str):
        raise bad("'model' must be a string.")
    if asked not in ("", "default_model", name):
        shown = asked if len(asked) <= 100 else f"{asked[:100]}..."
        raise ApiError(404, f"The model {shown!r} is not served here; {name!r} is.", "model_not_found")


def _check_number(body: dict[str, Any], key: str, low: float, high: float, types: tuple[Any, ...]) -> None:
    value = body.get(key)
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, types):
        raise bad(f"'{key}' must be {'an integer' if types == (int,) else 'a number'}.")
    if not low <= value <= high:
        raise bad(f"'{key}' must be from {low} to {high}.")


def _refuse_unsupported(body: dict[str, Any]) -> None:
    for key in ("n", "best_of"):
        if body.get(key, 1) != 1:
            raise bad(f"'{key}' must be 1: one answer a request. Send more requests; they run at once.", "unsupported")
    if body.get("response_format", {"type": "text"}) != {"type": "text"}:
        raise bad("'response_format' other than text is not supported.", "unsupported")
    if body.get("tool_choice", "auto") not in ("auto", "none"):
        raise bad('\'tool_choice\' must be "auto" or "none".', "unsupported")
    for key in ("functions", "function_call", "audio", "suffix", "draft_model", "adapters"):
        if body.get(key) not in (None, "default_model", "", []):
            raise bad(f"'{key}' is not supported. Leave it out.", "unsupported")
    if body.get("echo"):
        raise bad("'echo' is not supported. Leave it out.", "unsupported")
    if body.get("modalities", ["text"]) != ["text"]:
        raise bad("'modalities' other than text are not supported.", "unsupported")


def _include_usage(body: dict[str, Any]) -> bool:
    options = body.get("stream_options", {})
    if not isinstance(options, dict):
        raise bad("'stream_options' must be an object.")
    wanted = options.get("include_usage")
    if not isinstance(wanted, (bool, type(None))):
        raise bad("'include_usage' must be true or false.")
    return bool(wanted)


def _stop(value: Any) -> list[str]:
    words = [value] if isinstance(value, str) else value if value is not None else []
    if not isinstance(words, list) or len(words) > 16:
        raise bad("'stop' must be a string or a list of up to 16 strings.")
    if not all(isinstance(word, str) and 0 < len(word) <= 1000 for word in words):
        raise bad("'stop' must have strings of 1 to 1000 characters.")
    return list(dict.fromkeys(words))


def _logprobs(kind: str, body: dict[str, Any]) -> tuple[bool, int]:
    wanted, top = body.get("logprobs", False), body.get("top_logprobs", 0)
    if kind == "text" and isinstance(wanted, int) and not isinstance(wanted, bool):
        wanted, top = True, wanted  # of completions: how many of the likeliest
    if not isinstance(wanted, bool):
        raise bad("'logprobs' must be true or false; of completions also an integer.")
    if isinstance(top, bool) or not isinstance(top, int) or not -1 <= top <= _MOST_TOP:
        raise bad(f"'top_logprobs' must be an integer from 0 to {_MOST_TOP}.")
    return wanted, max(0, top) if wanted else 0


def _logit_bias(value: Any, vocab_size: int) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > 1024:
        raise bad("'logit_bias' must be an object of up to 1024 tokens.")
    bias = {}
    for key, number in value.items():
        token = int(key) if len(key) < 10 and key.isascii() and key.isdigit() else -1
        if not 0 <= token < vocab_size:
            raise bad(f"'logit_bias' must have tokens from 0 to {vocab_size - 1}.")
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not -100 <= number <= 100:
            raise bad("'logit_bias' must have numbers from -100 to 100.")
        bias[token] = float(number)
    return bias or None


def _template_arguments(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > 32:
        raise bad("'chat_template_kwargs' must be an object.")
    for key, part in value.items():
        if key in _TEMPLATE_OWN or not key.isidentifier():
            raise bad(f"'chat_template_kwargs' can't have {key[:100]!r}.")
        if not isinstance(part, (str, bool, int, float, type(None))):
            raise bad("'chat_template_kwargs' must have texts, numbers, and true or false.")
    return value


def _prompt(value: Any, vocab_size: int) -> tuple[str, list[int] | None]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, str):
        if not value:
            raise bad("'prompt' is empty.")
        return value, None
    if isinstance(value, list) and value and all(type(token) is int for token in value):
        if not all(0 <= token < vocab_size for token in value):
            raise bad(f"'prompt' must have tokens from 0 to {vocab_size - 1}.")
        return "", value
    if isinstance(value, list) and value and all(isinstance(part, (str, list)) for part in value):
        raise bad("'prompt' must be one prompt. Send more requests; they run at once.", "unsupported")
    raise bad("'prompt' must be a string, or a list of tokens.")


def _arguments(
    kind: str, body: dict[str, Any], options: ServeOptions, name: str, vocab_size: int
) -> GenerationArguments:
    logprobs, top_logprobs = _logprobs(kind, body)
    temperature = body.get("temperature", options.temp)
    top_k = body.get("top_k", options.top_k)
    seed, xtc = body.get("seed"), body.get("xtc_probability", 0.0)
    if seed is not None and xtc > 0:
        raise bad("'seed' and 'xtc_probability' exclude each other.", "unsupported")
    return GenerationArguments(
        model=ModelDescription(name, "", ""),
        sampling=SamplingArguments(
            temperature=temperature if temperature >= _LEAST_TEMP else 0.0,
            top_p=body.get("top_p", options.top_p),
            top_k=top_k if top_k < vocab_size else 0,
            min_p=body.get("min_p", options.min_p),
            xtc_probability=xtc,
            xtc_threshold=body.get("xtc_threshold", 0.1),
        ),
        logits=LogitsProcessorArguments(
            logit_bias=_logit_bias(body.get("logit_bias"), vocab_size),
            repetition_penalty=body.get("repetition_penalty", 0.0),
            repetition_context_size=body.get("repetition_context_size", 20),
            presence_penalty=body.get("presence_penalty", 0.0),
            presence_context_size=body.get("presence_context_size", 20),
            frequency_penalty=body.get("frequency_penalty", 0.0),
            frequency_context_size=body.get("frequency_context_size", 20),
        ),
        stop_words=_stop(body.get("stop")),
        max_tokens=body.get("max_completion_tokens") or body.get("max_tokens") or options.max_tokens,
        num_draft_tokens=0,
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        seed=seed,
        chat_template_kwargs=_template_arguments(body.get("chat_template_kwargs")),
    )


def plain_arguments(max_tokens: int, name: str = "") -> GenerationArguments:
    """Return how a request of the server's own is answered: the likeliest tokens.

    Args:
        max_tokens (int): Tokens of the answer.
        name (str): The model that is served. Default: ``""``.
    """
    return _arguments("text", {"max_tokens": max_tokens, "temperature": 0.0}, ServeOptions(), name, 1 << 30)
