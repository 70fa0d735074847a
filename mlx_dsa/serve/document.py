"""A document, and the prompts that read it and ask it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..config import SparseConfig
from ..template import ChatTemplate
from .errors import bad
from .segments import Prompt, common, state_of, turn_segments


@dataclass(eq=False)
class Document:
    """A document that has been read.

    Args:
        id (str): What clients call it.
        number (int): What prompts have in place of its first token.
        name (str): What it was called when it came.
        system (str): The system message that it was read with, or ``""``.
        tokens (list of int): Its tokens, with what the chat template puts before it.
        begins (int): Where in them its text begins.
        entries, nbytes (int): What its caches hold.
        created (int): When it was read, in seconds.
        path (Path, optional): Its file.
    """

    id: str
    number: int
    name: str
    system: str
    tokens: list[int]
    begins: int
    entries: int
    nbytes: int
    created: int
    path: Path | None = None

    def told(self) -> dict[str, Any]:
        """Return what clients are told."""
        return {
            "id": self.id,
            "object": "document",
            "name": self.name,
            "tokens": len(self.tokens),
            "entries": self.entries,
            "bytes": self.nbytes,
            "created": self.created,
            "status": "ready",
        }


class DocumentPrompts:
    """Make prompts of documents and messages.

    Args:
        tokenizer (TokenizerWrapper): The model's, with a chat template.
        lock (context manager): Held while the tokenizer works.
        config (SparseConfig, optional): Of the patch; ``None`` for a dense model.
        think (bool, optional): As :class:`ChatTemplate` takes it. Default: ``None``.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        lock: AbstractContextManager,
        config: SparseConfig | None,
        think: bool | None = None,
    ):
        self._tokenizer, self._lock, self._config = tokenizer, lock, config
        self.think = think

    def read(self, text: str, system: str) -> tuple[list[int], int]:
        """Make the prompt that reads a document.

        Args:
            text (str): The document.
            system (str): A system message, or ``""``.

        Returns:
            tuple: Its tokens, and where in them the text begins.

        Raises:
            ApiError: If the model's chat template can't.
        """
        template = ChatTemplate(self._tokenizer, system=system or None, think=self.think)
        try:
            with self._lock:
                template.check()
                tokens = template.encode(template.document(text))
                other = template.encode(template.document("\u2063"))
        except ValueError as error:
            raise bad(str(error).removeprefix("[chat] ")) from None
        return tokens, common(tokens, other)

    def ask(
        self,
        document: Document,
        messages: Sequence[Mapping[str, Any]],
        tools: Any = None,
        options: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """Make the prompt of a chat about a document, as mlx-lm's server takes it.

        Its first token is the document's number, so that only what was asked about it is found
        in its snapshots. The model is never given it: the document has been read.

        Args:
            document (Document): The document.
            messages (sequence): Of the chat; the document stands before the first user's.
            tools (list, optional): Must be none. Default: ``None``.
            options (Mapping, optional): What the request says to the chat template.
              Default: ``None``.

        Returns:
            tuple: The prompt, its segments, their kinds, the state in which an answer begins, and ``None``.

        Raises:
            ApiError: If it was read with something else before it.
        """
        own, turns = _split(document, messages, tools)
        template = {} if self.think is None else {"enable_thinking": self.think}
        place = secrets.token_hex(16)
        marked = [*own, {**turns[0], "content": place + turns[0]["content"]}, *turns[1:]]
        with self._lock:
            before, after = self._cut(marked, place, {**template, **(options or {})})
            if options and before != self._cut(marked, place, template)[0]:
                raise bad("These chat_template_kwargs change what stands before the document. Leave them out.")
            rest = self._tokenizer.encode(after, add_special_tokens=False)
            prompt = [document.number, *document.tokens[1:], *rest]
            options = {**template, **(options or {})}
            segments, kinds = turn_segments(self._tokenizer, prompt, [*own, *turns], options, self._config)
        return prompt, segments, kinds, state_of(self._tokenizer, rest), None

    def _cut(self, messages: list[Any], place: str, options: Mapping[str, Any]) -> tuple[str, str]:
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        except Exception as error:  # a template is a program that came with the model
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise bad(f"The model's chat template can't render these messages: {reason}") from None
        before, found, after = text.partition(place)
        if not found:
            raise bad("The model's chat template leaves out the message that the document stands before.")
        return before, after

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        with self._lock:
            return self._tokenizer.encode(text, add_special_tokens=False)

    def pieces(self, document: Document) -> list[str]:
        """Return the text of each token of a document: together they are the whole text."""
        with self._lock:
            writer, pieces = self._tokenizer.detokenizer, []
            for token in document.tokens:
                writer.add_token(token)
                pieces.append(writer.last_segment)
            writer.finalize()
            pieces[-1] += writer.last_segment
            return pieces


def _split(document: Document, messages: Sequence[Mapping[str, Any]], tools: Any) -> tuple[list, list]:
    """Return the system messages of a chat, as its document was read with, and its turns."""
    if tools:
        raise bad("A document is asked without tools: it was read without them. Leave 'tools' out.")
    n = next((i for i, m in enumerate(messages) if m.get("role") != "system"), len(messages))
    system, turns = "\n\n".join(str(m.get("content") or "") for m in messages[:n]), list(messages[n:])
    if system and system != document.system:
        told = "with another one" if document.system else "without one"
        raise bad(f"The document was read {told}: leave the system message out, or send the document with this one.")
    if not turns or turns[0].get("role") != "user" or any(m.get("role") == "system" for m in turns):
        raise bad("A chat about a document begins with a message of the user.")
    return [{"role": "system", "content": document.system}] if document.system else [], turns
