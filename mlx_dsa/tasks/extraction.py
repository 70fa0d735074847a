"""The answer inside a written solution of a GSM8K problem.

Two readings, by the rules of the `gsm8k` task of lm-evaluation-harness [1]: "strict" wants the
data set's own mark, `#### N`, and takes the first; "flexible" takes the last thing that looks like
a number. Before comparing, commas, dollar signs, everything up to `#### ` and one closing full
stop are dropped, and nothing else: "18.00" is not "18".

[1] https://github.com/EleutherAI/lm-evaluation-harness, lm_eval/tasks/gsm8k
"""

import re

INVALID = "[invalid]"
_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_IGNORED = (re.compile(","), re.compile(r"\$"), re.compile(r"(?s).*#### "), re.compile(r"\.$"))


def strict(text: str) -> str:
    """Return what follows the first `#### `, or "[invalid]"."""
    found = _STRICT.search(text)
    return found.group(1).strip() if found else INVALID


def flexible(text: str) -> str:
    """Return the last number of the text, or "[invalid]"."""
    found = _FLEXIBLE.findall(text)
    return found[-1].strip() if found else INVALID


def normalise(answer: str) -> str:
    """Return an answer in the form in which two are compared."""
    for pattern in _IGNORED:
        answer = pattern.sub("", answer)
    return answer.lower()


def matches(extracted: str, reference: str) -> bool:
    """Whether an extracted answer equals that of the reference solution (or the bare number)."""
    return normalise(extracted) == normalise(reference)
