"""No layer waits for the device, no graph grows, no block is too large."""

import mlx.core as mx
import pytest
from builders import EXACT, feed, make_indexers, make_model, make_tokens
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from simulate import LOGITS

from mlx_dsa import patch_sparse_generate


@pytest.mark.parametrize("cache", ["budget", "full"])
@pytest.mark.parametrize("prefill", ["exact", "tile"])
def test_no_layer_evaluates_anything(cache, prefill):
    """Evaluating an array raises while MLX traces a function."""
    model = make_model(layers=1)
    tokens = make_tokens(61)
    rules = dict(EXACT, cache=cache, prefill=prefill, tile_size=16)
    with patch_sparse_generate(model, make_indexers(model), **rules):
        caches = make_prompt_cache(model)

        def run(tokens):
            out, start = [], 0
            for length in [40, *[1] * 6, 9, 1, 1]:  # evicts, and a later turn
                part = tokens[:, start : start + length]
                out.append(model(part, cache=caches))
                start += length
            return out

        mx.compile(run)(tokens)
    assert [c.size() for c in caches] == [24 if cache == "budget" else 57]

    def reads(tokens):
        return tokens + tokens.sum().item()

    with pytest.raises(ValueError):
        mx.compile(reads)(tokens)


@pytest.mark.parametrize("layers, dense, starter", [(6, [], 3), (6, [0, 2], 5), (2, [], 1)])
def test_the_device_starts_once_a_chunk_and_never_in_decode(layers, dense, starter, monkeypatch):
    """At the fourth sparse layer, or the last one; the result is the same bits."""
    model = make_model(layers=layers)
    tokens = make_tokens(61)
    rules = dict(EXACT, dense_layers=dense)
    started = []

    def read():
        with patch_sparse_generate(model, make_indexers(model), **rules) as patch:
            assert [i for i, layer in patch.layers.items() if layer.starts] == [starter]
            caches = make_prompt_cache(model)
            outputs = [model(tokens[:, i : i + 30], cache=caches) for i in (0, 30)]
            n_chunks = len(started)
            outputs += [model(tokens[:, 60:], cache=caches)]
        return mx.concatenate(outputs, axis=1), n_chunks

    lazy = mx.async_eval
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: None)
    expected, _ = read()
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: (started.extend(arrays), lazy(*arrays)))
    logits, n_chunks = read()
    assert n_chunks == len(started) == 2
    assert mx.array_equal(logits, expected)


def arrays_of(caches):
    leaves = tree_flatten([c.state for c in caches])
    return [a for _, a in leaves if isinstance(a, mx.array)]


def graph_size(arrays, tmp_path):
    """Return the size of the pending graph of arrays, in bytes of its drawing."""
    file = tmp_path / "graph.dot"
    mx.export_to_dot(str(file), *arrays)
    return file.stat().st_size


@pytest.mark.parametrize("cache", ["budget", "full"])
@pytest.mark.parametrize("top_k", [24, 400])
def test_the_graph_does_not_grow_while_tokens_are_generated(top_k, cache, tmp_path):
    """Only logits are evaluated, as generate_step does, also with unused keys."""
    model = make_model()
    rules = dict(EXACT, top_k=top_k, cache=cache)
    sizes = []
    with patch_sparse_generate(model, make_indexers(model), **rules):
        caches, _ = feed(model, make_tokens(50), 49)
        for i in range(40):
            mx.eval(model(make_tokens(1, i), cache=caches))
            sizes.append(graph_size(arrays_of(caches), tmp_path))
    assert max(sizes[20:]) <= max(sizes[:20])


def test_the_graph_does_not_grow_while_a_prompt_is_read(tmp_path):
    """Nor do the observed queries, before anything uses them."""
    model = make_model()
    sizes = []
    with patch_sparse_generate(model, make_indexers(model), **EXACT):
        caches = make_prompt_cache(model)
        for i in range(40):
            mx.eval(model(make_tokens(2, i), cache=caches))
            sizes.append(graph_size(arrays_of(caches), tmp_path))
    assert max(sizes[20:]) <= max(sizes[:20])


def test_graph_size_sees_a_graph_that_grows(tmp_path):
    x, sizes = mx.zeros(4), []
    for _ in range(3):
        x = x + 1
        sizes.append(graph_size([x], tmp_path))
    assert sizes[0] < sizes[1] < sizes[2]


@pytest.mark.parametrize("prefill", ["exact", "tile"])
@pytest.mark.parametrize("batch", [1, 4])
def test_score_blocks_are_split(prefill, batch, monkeypatch):
    """Blocks of scores stay under a bound, for the same result."""
    import mlx_dsa.chunks as chunks
    import mlx_dsa.ops.reference as ops
    import mlx_dsa.rules.lightning as lightning

    model = make_model(layers=1)
    indexers = make_indexers(model)
    tokens = make_tokens(260, batch=batch)
    rules = dict(EXACT, prefill=prefill, tile_size=16)
    with patch_sparse_generate(model, indexers, **rules):
        _, expected = feed(model, tokens, 260)
        limit, sizes = batch * 4 * 260 * 20, []

        def spy(function):
            def call(*args, **kwargs):
                scores = function(*args, **kwargs)
                sizes.append(scores.nbytes)
                return scores

            return call

        monkeypatch.setattr(chunks, "BLOCK_BYTES", limit)
        monkeypatch.setattr(ops, "BLOCK_BYTES", limit)
        monkeypatch.setattr(lightning, "index_scores", spy(lightning.index_scores))
        monkeypatch.setattr(ops, "_sum_heads", spy(ops._sum_heads))
        _, split = feed(model, tokens, 260)
    assert mx.abs(split - expected).max() < LOGITS
    assert len(sizes) > 10 and max(sizes) <= limit


def test_real_score_blocks_are_below_512_mb():
    from mlx_dsa.ops.reference import BLOCK_BYTES

    # Ordering them takes 8 bytes where a score has 4.
    assert 2 * BLOCK_BYTES < 512e6
