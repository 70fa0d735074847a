"""What a model's chat template puts around the texts of a conversation."""

from __future__ import annotations

import secrets

from mlx_lm.tokenizer_utils import TokenizerWrapper


class ChatTemplate:
    """Turn what is said into the tokens that a cache has not seen yet.

    A cache that has seen the earlier turns needs only a part of what the template
    renders. Where that part begins is found by a placeholder, which is drawn anew
    each time and stands in no text: so no text can look like it.

    Args:
        tokenizer (TokenizerWrapper): The model's tokenizer.
        system (str, optional): A system message. Default: ``None``.
        think (bool, optional): Whether the model is to think before it answers.
          Default: ``None``, as the template does by itself.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        *,
        system: str | None = None,
        think: bool | None = None,
    ):
        self.tokenizer = tokenizer
        self._begin = [{"role": "system", "content": system}] if system else []
        self._think = think

    def check(self) -> None:
        """Refuse a model that can't chat, or not in the way that was asked for.

        Raises:
            ValueError: If there is no chat template, or it does not know how to turn
              thinking on and off.
        """
        if not self.tokenizer.has_chat_template:
            raise ValueError("[chat] this model has no chat template. Use: mlx-dsa generate --raw")
        if self._think is None:
            return
        messages = [*self._begin, _user("-")]
        if self._render(messages, think=True) == self._render(messages, think=False):
            option = "--think" if self._think else "--no-think"
            raise ValueError(
                f"[chat] {option} has no effect: this model's chat template does not know "
                f"enable_thinking. Leave it out."
            )

    def first(self, message: str) -> list[int]:
        """Return the prompt of a conversation's first message."""
        return self.encode(self._render([*self._begin, _user(message)]))

    def document(self, text: str) -> str:
        """Render the beginning of a first message, which goes on after a document.

        Args:
            text (str): The document.

        Returns:
            str: What the document makes of the prompt, for :meth:`encode`. It ends in the
            document without its outer white space, and an empty line.
        """
        text, place = f"{text.strip()}\n\n", self._new_place(text)
        return self._cut([*self._begin, _user(text + place)], place)[0]

    def after_document(self, message: str) -> list[int]:
        """Return what follows :meth:`document`: the message, and its end."""
        place = self._new_place(message)
        return self.encode(self._cut([_user(place + message)], place)[1])

    def after_answer(self, message: str) -> list[int]:
        """Return what follows an answer: its end mark, then the next message."""
        place = self._new_place(message)
        answer = {"role": "assistant", "content": place}
        return self.encode(self._cut([_user("-"), answer, _user(message)], place)[1])

    def thinks(self, answer: list[int]) -> bool:
        """Whether an answer so far ends inside a block of thoughts.

        Args:
            answer (list of int): The answer's tokens.
        """
        if not self.tokenizer.has_thinking:
            return False
        # Some templates open the block themselves, where the answer begins.
        place = self._new_place()
        tokens = self.encode(self._cut([_user(place)], place)[1]) + answer
        find_end = self.tokenizer.rfind_think_end
        return self.tokenizer.rfind_think_start(tokens) > find_end(tokens)

    def end_of_thoughts(self) -> list[int]:
        """Return what closes a block of thoughts, as Qwen3's template does."""
        return self.encode(f"\n{self.tokenizer.think_end}\n\n")

    def _cut(self, messages: list[dict], place: str) -> tuple[str, str]:
        before, found, after = self._render(messages).partition(place)
        if not found:
            raise ValueError(
                "[chat] this model's chat template changes or leaves out what is said. Use: mlx-dsa generate --raw"
            )
        return before, after

    def _new_place(self, text: str = "") -> str:
        texts = [text, *(message["content"] for message in self._begin)]
        place = secrets.token_hex(16)
        return self._new_place(text) if any(place in t for t in texts) else place

    def _render(self, messages: list[dict], think: bool | None = None) -> str:
        think = self._think if think is None else think
        options = {} if think is None else {"enable_thinking": think}
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        # A template is a program that came with the model: it can raise anything.
        except Exception as error:
            raise ValueError(
                f"[chat] this model's chat template fails: {error or type(error).__name__}. "
                f"Mend it, or use: mlx-dsa generate --raw"
            ) from error

    def encode(self, text: str) -> list[int]:
        """Return the tokens of what was rendered."""
        return self.tokenizer.encode(text, add_special_tokens=False)


def _user(text: str) -> dict:
    return {"role": "user", "content": text}
