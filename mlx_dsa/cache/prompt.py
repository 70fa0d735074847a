"""Which calls of a model belong to a prompt, and which are steps of decode."""

from __future__ import annotations

import copy
from typing import Literal


class PromptPhase:
    """Follow the calls that one cache sees, from a prompt to decode.

    A call of several tokens is of a prompt. A call of one token after it may be the
    last of the prompt, or may not: mlx-lm hands a prompt of ``k * step + 2`` tokens over
    in calls that end in 1, 1. It reads the ``state`` of every cache after each call of a
    prompt but the last, and never in decode. So a call of one token ends the prompt
    unless ``state`` is read after it; the next call tells, and what ends with the prompt
    is done then.

    Callers that read ``state`` in decode too must not keep a prompt open for ever:
    after a call of several tokens, no prompt goes on after two of one. Only a cache
    that has never seen more than one token at once takes all of them for a prompt, as
    with ``prefill_step_size=1``.

    Attributes:
        held (str, optional): What a caller says that calls are, whatever their length:
          ``"prompt"`` or ``"decode"``.
        copies_decode (bool): Deep copies are held in decode: mlx-lm's evaluator reads a
          context, and then a continuation in one call with a copy of the cache.
    """

    def __init__(self):
        self.held: Literal["prompt", "decode"] | None = None
        self.copies_decode = False
        self._decoding = False
        self._ended = False  # by the last call, if its state is not read
        self._had_chunk = False
        self._singles = 0  # calls of one token since then

    def call(self, n_tokens: int) -> bool:
        """Note a call; return whether it belongs to a prompt.

        Args:
            n_tokens (int): Tokens of the call.
        """
        if self.held is not None:
            self.reopen() if self.held == "prompt" else self.end()
            return self.held == "prompt"
        if n_tokens > 1:
            self.reopen()
            return True
        if self._decoding or self._ended:
            self.end()
            return False
        self._singles += 1
        self._ended = True
        return True

    @property
    def decodes(self) -> bool:
        """Whether a call of one token now would be a step of decode."""
        return self.held == "decode" if self.held else self._decoding or self._ended

    def state_was_read(self):
        """Note that the cache's ``state`` was read."""
        if self._ended and (not self._had_chunk or self._singles == 1):
            self._ended = False

    def reopen(self):
        """Note that a prompt begins or goes on."""
        self._decoding = self._ended = False
        self._had_chunk, self._singles = True, 0

    def end(self):
        """Note that the prompt is over: what follows is decode."""
        self._decoding, self._ended = True, False

    def __deepcopy__(self, memo: dict) -> PromptPhase:
        other = copy.copy(self)
        other.held = "decode" if self.copies_decode else None
        return other

    @property
    def ended(self) -> bool:
        """Whether the last call was a prompt's last one, as far as is known."""
        return self._ended

    @property
    def code(self) -> int:
        """What the calls have said, as a whole number."""
        flags = (self._decoding, self._ended, self._had_chunk)
        return sum(flag << i for i, flag in enumerate(flags)) + 8 * min(self._singles, 2)

    @classmethod
    def from_code(cls, code: int, like: PromptPhase | None = None) -> PromptPhase:
        """Build one from another's ``code``; what callers have said is as in ``like``."""
        prompt = cls() if like is None else copy.copy(like)
        prompt._decoding, prompt._ended, prompt._had_chunk = (bool(code >> i & 1) for i in range(3))
        prompt._singles = code >> 3
        return prompt
