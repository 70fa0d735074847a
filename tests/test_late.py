"""Hidden states that wait until something is made of several at once."""

import mlx.core as mx
import pytest
from builders import SHAPES, feed, make_model, make_tokens, with_heads
from mlx_lm.models.cache import make_prompt_cache

from mlx_dsa import patch_sparse_generate
from mlx_dsa.cache.late import LateStates


def make_states(n, rows=2):
    return [mx.random.normal((rows, 1, 4)) for _ in range(n)]


@pytest.mark.parametrize("room", [1, 8, 64])
def test_states_come_back_in_their_order(room):
    late = LateStates(room)
    for n in (1, 15, 16, 17, 40, 3):  # one after the other, in the same room
        states = make_states(n)
        written = [late.add(x) is not None for x in states]
        assert [i for i, w in enumerate(written, start=1) if w] == [*range(16, n + 1, 16)]
        assert len(late) == n
        expected = mx.concatenate(states, axis=1)
        assert mx.array_equal(late.join(), expected)
        assert mx.array_equal(late.join(), expected)  # and stay
        late.clear()
        assert len(late) == 0
    more = make_states(5)
    late.add(mx.concatenate(more[:3], axis=1))
    late.join()
    for x in more[3:]:
        late.add(x)
    assert mx.array_equal(late.join(), mx.concatenate(more, axis=1))


def test_what_was_joined_stays_what_it_was():
    """Writes in place don't reach what was handed out."""
    late = LateStates(64)
    for x in make_states(3):
        late.add(x)
    handed_out = late.join()
    before = mx.array(handed_out)
    mx.eval(before)
    late.clear()
    for x in make_states(20):
        late.add(x)
    mx.eval(late.join())
    assert mx.array_equal(handed_out, before)


@pytest.mark.parametrize("evict", ["retention", "index"])
def test_when_states_are_joined_changes_no_bit(evict):
    """Reading the state joins them at every step, generation 16 at a time."""
    model = make_model(**SHAPES["gqa2"])
    rules = dict(top_k=192, n_sink=3, n_recent=40, prefill="exact", evict=evict)
    tokens = mx.concatenate([make_tokens(330), make_tokens(330, 1)])
    with patch_sparse_generate(model, with_heads(model), **rules):
        cache = make_prompt_cache(model)
        feed(model, tokens[:, :200], 200, cache)
        logits = []
        for i in range(200, 330):
            logits.append(model(tokens[:, i : i + 1], cache=cache))
            mx.eval(logits[-1])
        other, _ = feed(model, tokens[:, :200], 200)
        _, expected = feed(model, tokens[:, 200:], 1, other)
    assert mx.array_equal(mx.concatenate(logits, axis=1), expected)
    assert mx.array_equal(cache[0].positions, other[0].positions)
    assert 0 < cache[0].n_late == other[0].n_late
