"""What surrounds a document, a question and an answer in a model's own chat format."""

import itertools
from dataclasses import dataclass

_MARKS = ("\x02first\x02", "\x02second\x02", "\x02third\x02")


# Said after a question to make it longer: none says anything of the answer.
_CLOSINGS = (
    "Please answer.",
    "Use what stands above.",
    "Be exact.",
    "No explanation is needed.",
    "It stands somewhere in the text above.",
    "Take the time that you need.",
    "Thanks.",
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


def frame(tokenizer):
    """Read off a tokenizer's chat template what it puts around texts.

    Thinking is switched off where the template knows the switch. A tokenizer without a template
    gets a plain one: text, blank line, "Answer:".
    """
    if not getattr(tokenizer, "chat_template", None):
        return Frame("", "\n\nAnswer:", "\n\n")
    first, second, third = _MARKS

    def render(*turns):
        roles = ("user", "assistant", "user")
        messages = [{"role": r, "content": t} for r, t in zip(roles, turns)]
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )

    head, tail = render(first).split(first)
    again = render(first, second, third).split(second)[1].split(third)[0]
    return Frame(head, tail, again)


def evened(texts, encode, before="", after=""):
    """Return the tokens of questions made equally long by what a person may say after one.

    Caches hold rows of one length: equally long questions are answered as one batch.

    Args:
        texts (list of str): the questions.
        encode (callable): from a text to its tokens.
        before, after (str): what stands around each. Default: ``""``.

    Returns:
        list: of token lists; as different as they were where no closings make them equal.
    """
    # How many tokens more -> what is said: the least of it.
    said = {}
    for n in range(len(_CLOSINGS) + 1):
        for closings in itertools.combinations(_CLOSINGS, n):
            closing = "".join(f" {closing}" for closing in closings)
            said.setdefault(len(encode(closing)), closing)
    plain = [encode(before + text + after) for text in texts]
    longest = max(map(len, plain), default=0)
    for length in range(longest, longest + max(said) + 1):
        more = [said.get(length - len(ids)) for ids in plain]
        if None in more:
            continue
        found = [encode(before + text + closing + after) for text, closing in zip(texts, more)]
        if {len(ids) for ids in found} == {length}:
            return found
    return plain
