"""How a request's tokens are sampled, so that no request disturbs another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, make_logits_processors, make_sampler
from mlx_lm.server import GenerationArguments

Sampler = Callable[[mx.array], mx.array]


def sampler_of(args: GenerationArguments, special: list[int]) -> Sampler:
    """Return what takes log-probabilities to tokens.

    With a seed the randomness is the request's own: its answer is the same whatever else is
    in the batch, and no other request is told apart by it.

    Args:
        args (GenerationArguments): What the request says.
        special (list of int): Tokens that XTC leaves alone.
    """
    how = args.sampling
    if args.seed is not None and how.temperature > 0:
        return _seeded(args)
    return make_sampler(
        how.temperature,
        top_p=how.top_p,
        top_k=how.top_k,
        min_p=how.min_p,
        xtc_probability=how.xtc_probability,
        xtc_threshold=how.xtc_threshold,
        xtc_special_tokens=special,
    )


def _seeded(args: GenerationArguments) -> Sampler:
    how = args.sampling
    key = [mx.random.key((args.seed or 0) % 2**64)]

    def sample(logprobs: mx.array) -> mx.array:
        if 0 < how.top_p < 1:
            logprobs = apply_top_p(logprobs, how.top_p)
        if how.min_p:
            logprobs = apply_min_p(logprobs, how.min_p)
        if how.top_k:
            logprobs = apply_top_k(logprobs, how.top_k)
        key[0], own = mx.random.split(key[0])
        return mx.random.categorical(logprobs * (1 / how.temperature), key=own)

    return sample


def processors_of(args: GenerationArguments) -> list[Callable]:
    """Return what changes the logits before they are sampled."""
    how = args.logits
    return make_logits_processors(
        how.logit_bias,
        how.repetition_penalty,
        how.repetition_context_size,
        how.presence_penalty,
        how.presence_context_size,
        how.frequency_penalty,
        how.frequency_context_size,
    )


def try_out(sampler: Sampler, processors: list[Callable], prompt: list[int], vocab_size: int) -> None:
    """Run a sampler once, so that what fails does so before it is in a batch with others.

    Args:
        sampler (callable): From :func:`sampler_of`.
        processors (list): From :func:`processors_of`.
        prompt (list of int): The prompt's tokens.
        vocab_size (int): Tokens that there are.

    Raises:
        ValueError: Or whatever else the sampler raises.
    """
    logits = mx.zeros((1, vocab_size))
    for processor in processors:
        logits = processor(mx.array(prompt[-64:]), logits)
    mx.eval(sampler(logits))


class StopText:
    """Find stop texts in an answer, however they were cut into tokens.

    Args:
        words (list of str): The stop texts.
    """

    def __init__(self, words: list[str]):
        self._words = words
        self._keep = max(map(len, words), default=0) - 1
        self._tail = ""

    def end_in(self, piece: str) -> int | None:
        """Take the next piece of text in; return where in it a first stop text ends, if one does."""
        if not self._words:
            return None
        text, before = self._tail + piece, len(self._tail)
        ends = [text.find(word) + len(word) for word in self._words if word in text]
        self._tail = text[-self._keep :] if self._keep > 0 else ""
        return min(ends) - before if ends else None


def top_tokens(logprobs: mx.array, n: int) -> tuple[dict[str, Any], ...]:
    """Return the most likely tokens and their log-probabilities, the likeliest first."""
    n = min(n, logprobs.shape[-1])
    if n <= 0:
        return ()
    best = mx.argpartition(-logprobs, kth=n - 1)[:n]
    pairs: Any = zip(cast(Any, best.tolist()), cast(Any, logprobs[best].tolist()))
    return tuple({"id": i, "logprob": p} for i, p in sorted(pairs, key=lambda pair: -pair[1]))
