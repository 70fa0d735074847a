"""What a server keeps of prompts, for prompts that begin alike."""

import logging
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from builders import VOCAB, make_indexers, make_model, make_tokens
from mlx_lm.models.cache import ArraysCache, KVCache, make_prompt_cache

from mlx_dsa import load_preset, patch_sparse_generate
from mlx_dsa.serve import snapshots as module
from mlx_dsa.serve.segments import plain_segments, segments_of
from mlx_dsa.serve.snapshots import Snapshots
from mlx_dsa.serve.store import SnapshotStore

LARGE = 1 << 30
STREAM = dict(top_k=32, n_recent=8, n_sink=2, prefill="stream", stream_chunk=24, positions="compact")
TILE = dict(top_k=48, n_recent=8, n_sink=2, tile_size=16)


class Server:
    """Serve one request after another, as mlx-lm's server does a batch of one."""

    def __init__(self, model, patch, snapshots, step=64):
        self.model, self.patch, self.snapshots, self.step = model, patch, snapshots, step
        snapshots.attach(patch)

    def ask(self, prompt, cuts=None, n=4):
        """Return the answer, its logits, and how many tokens of the prompt were cached."""
        config = self.patch.config if self.patch else None
        segments, kinds = cuts or plain_segments(prompt, config)
        caches, rest = self.snapshots.fetch_nearest_cache("m", prompt)
        assert rest and list(prompt[len(prompt) - len(rest) :]) == rest
        done = len(prompt) - len(rest)
        caches = caches or make_prompt_cache(self.model)
        assert all(c.offset == done for c in caches if hasattr(c, "offset"))
        cached, place = done, 0
        segments = [*segments[:-1], segments[-1][:-1], segments[-1][-1:]]
        for segment, kind in zip(segments[:-1], kinds):
            place += len(segment)
            if place <= cached:
                continue
            while done < place:
                stop = min(done + self.step, place)
                self.model(mx.array([prompt[done:stop]]), cache=caches)
                mx.eval([c.state for c in caches])
                done = stop
            self.snapshots.insert_cache("m", prompt[:done], module.trimmed(caches, 0), cache_type=kind)
        token, answer, logits = prompt[-1], [], []
        for _ in range(n):
            logits.append(self.model(mx.array([[token]]), cache=caches)[0, -1])
            token = logits[-1].argmax().item()
            answer.append(token)
        self.snapshots.insert_cache("m", [*prompt, *answer[:-1]], caches)
        return SimpleNamespace(tokens=answer, logits=mx.stack(logits), cached=cached)


@pytest.fixture
def served():
    """Return a function that makes a server on a small random model."""
    patches = []

    def make(snapshots=None, settings=STREAM, model=None, retention_dim=8):
        model = model or make_model()
        patch = None
        if settings is not None:
            patch = patch_sparse_generate(model, make_indexers(model, retention_dim=retention_dim), **settings)
            patches.append(patch)
        return Server(model, patch, Snapshots(LARGE) if snapshots is None else snapshots)

    yield make
    for patch in patches:
        patch.restore()


def words(n, seed=2):
    return make_tokens(n, seed=seed)[0].tolist()


def close(a, b, within=1e-4):
    return mx.abs(a.logits - b.logits).max().item() <= within


@pytest.mark.parametrize("settings", [STREAM, TILE, None], ids=["stream", "tile", "dense"])
@pytest.mark.parametrize("length", [40, 71, 72, 73, 100, 118, 121])
def test_another_question_and_the_first_again(served, settings, length):
    """Of one prompt all is re-used but the question, of the same one all but a token."""
    text, questions = words(length), [words(12, seed=s) for s in (5, 6)]
    questions[1][0] = (questions[0][0] + 1) % VOCAB
    server = served(settings=settings)
    alone = [served(Snapshots(0), settings=None, model=server.model) for _ in range(2)]
    for one in alone:
        one.patch = server.patch
    first, other, again = (server.ask([*text, *questions[i]]) for i in (0, 1, 0))
    assert (first.cached, other.cached, again.cached) == (0, length, length + 11)
    for asked, i in ((first, 0), (other, 1), (again, 0)):
        cold = alone[0].ask([*text, *questions[i]])
        assert cold.cached == 0
        # Tiles stand elsewhere where a prompt is read from another place on.
        assert asked.tokens == cold.tokens if settings is TILE else close(asked, cold)


def test_without_the_place_before_the_cut_a_stream_reads_again(served, monkeypatch):
    """The control of what "context" is for."""
    text, questions = words(70), [words(12, seed=s) for s in (5, 6)]
    server = served()
    whole = lambda prompt: ([prompt], ["prompt"])  # noqa: E731
    server.ask([*text, *questions[0]], whole([*text, *questions[0]]))
    assert server.ask([*text, *questions[1]], whole([*text, *questions[1]])).cached == 0
