"""Where a prompt is cut, so that what was read up to there can be kept for a later request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..config import SparseConfig

# What stands for texts that are not known yet; no template has a place of its own for it.
_SOME = {"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}

Segments = tuple[list[list[int]], list[str]]
# The tokens, their segments and kinds, the state in which an answer begins, and no images.
Prompt = tuple[list[int], list[list[int]], list[str], str, None]


def prompt_of(
    tokenizer: TokenizerWrapper,
    messages: Sequence[Mapping[str, Any]],
    template: Mapping[str, Any],
    config: SparseConfig | None = None,
) -> Prompt:
    """Make the prompt of a chat, as ``_tokenize`` of mlx-lm's server returns it.

    Args:
        tokenizer, messages, template, config: As in :func:`segments_of`; each content is one text.

    Returns:
        tuple: All of it, with ``None`` for images.

    Raises:
        Exception: What the chat template raises.
    """
    prompt = tokenizer.apply_chat_template(
        list(messages), **{**template, "tokenize": True, "add_generation_prompt": True}
    )
    return prompt, *segments_of(tokenizer, prompt, messages, template, config), state_of(tokenizer, prompt), None


def state_of(tokenizer: TokenizerWrapper, prompt: Sequence[int]) -> str:
    """Return in which state the answer to a prompt begins: ``"normal"`` or ``"reasoning"``.

    Args:
        tokenizer (TokenizerWrapper): The model's.
        prompt (sequence of int): The prompt's tokens, or its last ones.
    """
    thinks = tokenizer.has_thinking and tokenizer.rfind_think_start(prompt) > tokenizer.rfind_think_end(prompt)
    return tokenizer.response_initial_state or ("reasoning" if thinks else "normal")


def segments_of(
    tokenizer: TokenizerWrapper,
    prompt: Sequence[int],
    messages: Sequence[Mapping[str, Any]],
    template: Mapping[str, Any],
    config: SparseConfig | None = None,
) -> Segments:
    """Cut the prompt of a chat: after the system messages, and after the last turn, before
    what only the answer to it begins with.

    Args:
        tokenizer (TokenizerWrapper): The model's tokenizer, with a chat template.
        prompt (sequence of int): The prompt's tokens, with the generation prompt.
        messages (sequence): The messages that were rendered.
        template (Mapping): What ``apply_chat_template`` was given beside them, such as
          ``tools``.
        config (SparseConfig, optional): Of the patch; ``None`` for a dense model.

    Returns:
        tuple: The segments, one after the other the prompt, and the kind of what is kept at the end of
        each: ``"system"``, ``"user"``, ``"context"`` (just before the last cut of a stream) or
        ``"prompt"``, the last.
    """
    kinds: dict[int, str] = {}
    text = _render(tokenizer, messages, template)
    if text is not None:
        kinds[_end_of_system(tokenizer, prompt, messages, template, text)] = "system"
        kinds[_end_of_turn(tokenizer, prompt, messages, template, text)] = "user"
    return _cut(prompt, kinds, config)


def turn_segments(
    tokenizer: TokenizerWrapper,
    prompt: Sequence[int],
    messages: Sequence[Mapping[str, Any]],
    template: Mapping[str, Any],
    config: SparseConfig | None = None,
) -> Segments:
    """Cut a prompt after its last turn alone: see :func:`segments_of`. Of the texts in
    ``messages`` only the last turn's must be what the prompt has."""
    text = _render(tokenizer, messages, template)
    kinds = {} if text is None else {_end_of_turn(tokenizer, prompt, messages, template, text): "user"}
    return _cut(prompt, kinds, config)


def plain_segments(prompt: Sequence[int], config: SparseConfig | None = None) -> Segments:
    """Cut a prompt that is no chat: see :func:`segments_of`."""
    return _cut(prompt, {}, config)


def _cut(prompt: Sequence[int], kinds: dict[int, str], config: SparseConfig | None) -> Segments:
    prompt = list(prompt)
    last = len(prompt) - 1  # the last token is read by itself: at least it must be left
    kinds = {min(place, last): kind for place, kind in kinds.items() if place > 0}
    if config is not None and config.prefill == "stream":
        # What is read just before a cut still holds everything since the cut before it, so it
        # can be taken back to any place between both.
        cut = len(prompt) // config.stream_chunk * config.stream_chunk
        if cut > max(config.top_k, 1):
            kinds.setdefault(cut - 1, "context")
    kinds.pop(0, None)
    places = sorted(kinds)
    segments = [prompt[a:b] for a, b in zip([0, *places], [*places, len(prompt)])]
    return segments, [*(kinds[place] for place in places), "prompt"]


def _end_of_system(tokenizer, prompt, messages, template, text) -> int:
    """Return how many tokens are of system messages and tools."""
    n_system = next((i for i, m in enumerate(messages) if m.get("role") != "system"), len(messages))
    if not n_system and not template.get("tools") or n_system == len(messages):
        return 0
    said = str(messages[n_system].get("content") or "").strip()
    other = {"role": "user", "content": "y" if said.startswith("x") else "x"}
    rendered = _render(tokenizer, [*messages[:n_system], other], template)
    if rendered is None:
        return 0
    # These are few tokens; what a merge over the edge makes another is left out.
    begin = tokenizer.encode(text[: common(text, rendered)], add_special_tokens=False)
    return common(begin, prompt)


def _end_of_turn(tokenizer, prompt, messages, template, text) -> int:
    """Return how many tokens a later prompt, which goes on from an answer, has too."""
    later = _render(tokenizer, [*messages, *_SOME], template)
    if later is None:
        return 0
    shared = common(text, later)
    # Encoding a whole prompt again would hold up whoever is being answered: what is not in
    # common is short, and begins with a mark of the template, which is a token by itself.
    rest = tokenizer.encode(text[shared:], add_special_tokens=False) if shared < len(text) else []
    n = len(prompt) - len(rest)
    if list(prompt[n:]) == rest:
        return n
    return common(tokenizer.encode(text[:shared], add_special_tokens=False), prompt)


def _render(tokenizer, messages, template) -> str | None:
    try:
        return tokenizer.apply_chat_template(
            list(messages), **{**template, "tokenize": False, "add_generation_prompt": True}
        )
    except Exception:  # a template is a program that came with the model, and this is an extra
        return None


def common(a: Any, b: Any) -> int:
    """Return the length of the longest common beginning of two texts or lists.

    Args:
        a, b (str or list): Them.
    """
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
