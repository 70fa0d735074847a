"""What surrounds a document, a question and an answer in a model's own chat format."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_MARKS = ("\x02first\x02", "\x02second\x02", "\x02third\x02")


# Said after a question to make it longer: none says anything of the answer.
CLOSINGS = (
    "Please answer.",
    "Use what stands above.",
    "Be exact.",
    "No explanation is needed.",
    "It stands somewhere in the text above.",
    "Take the time that you need.",
    "Thanks.",
)
# For questions whose replies are begun: beginnings differ in length too.
MORE_CLOSINGS = (
    *CLOSINGS,
    "I have read it, but I don't recall what it was.",
    "Look it up once more if that helps you.",
)


@dataclass(frozen=True)
class Frame:
    """The texts around the parts of a conversation.

    Args:
        head: before the first user's text.
        tail: from there to where the model writes.
        again: from the end of the model's answer to the second user's text.
    """

    head: str
    tail: str
    again: str


def frame(tokenizer: Any) -> Frame:
    """Read off a tokenizer's chat template what it puts around texts.

    Thinking is switched off where the template knows the switch. A tokenizer without a template
    gets a plain one: text, blank line, "Answer:".
    """
    if not getattr(tokenizer, "chat_template", None):
        return Frame("", "\n\nAnswer:", "\n\n")
    first, second, third = _MARKS

    def render(*turns: str) -> str:
        roles = ("user", "assistant", "user")
        messages = [{"role": r, "content": t} for r, t in zip(roles, turns)]
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )

    head, tail = render(first).split(first)
    again = render(first, second, third).split(second)[1].split(third)[0]
    return Frame(head, tail, again)


def begun(tail: str, stem: str) -> str:
    """Return what leads to a reply that is begun: the chat format's tail, and how the reply begins."""
    blank = " " if stem and tail and not tail[-1].isspace() else ""
    return tail + blank + stem


def evened(
    texts: Sequence[str],
    encode: Callable[[str], list[int]],
    before: str = "",
    after: str | Sequence[str] = "",
    closings: Sequence[str] = CLOSINGS,
) -> list[list[int]]:
    """Return the tokens of questions made equally long by what a person may say after one.

    Caches hold rows of one length: equally long questions are answered as one batch.

    Args:
        texts (list of str): the questions.
        encode (callable): from a text to its tokens.
        before (str), after (str or list of str): what stands around them: the same for all, or after
            each its own. Default: ``""``.
        closings (tuple of str): what may be said. Default: a few.

    Returns:
        list: of token lists; as different as they were where no closings make them equal.
    """
    # How many tokens more -> what is said: the least of it.
    said: dict[int, str] = {}
    for n in range(len(closings) + 1):
        for some in itertools.combinations(closings, n):
            closing = "".join(f" {closing}" for closing in some)
            said.setdefault(len(encode(closing)), closing)
    afters = [after] * len(texts) if isinstance(after, str) else after
    plain = [encode(before + text + after) for text, after in zip(texts, afters)]
    longest = max(map(len, plain), default=0)
    for length in range(longest, longest + max(said) + 1):
        more = [length - len(ids) for ids in plain]
        if not said.keys() >= set(more):
            continue
        parts = zip(texts, more, afters)
        found = [encode(before + text + said[n] + after) for text, n, after in parts]
        if {len(ids) for ids in found} == {length}:
            return found
    return plain
