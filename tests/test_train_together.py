"""Indexers and retention heads in one run: each learns as it does alone."""

import json
import os
from dataclasses import asdict

import mlx.core as mx
import numpy as np
import pytest
from builders import make_model
from mlx.utils import tree_flatten
from test_train import SMALL as INDEXERS
from test_train import make_tokenizer, write_text

from mlx_dsa import load_indexers
from mlx_dsa.train import RetentionConfig, TrainConfig, train_indexers, train_together
from mlx_dsa.train import loop as loop_module
from mlx_dsa.train.config import LayerScore, RunConfig
from mlx_dsa.train.data import Sequence
from mlx_dsa.train.lessons import make_lessons
from mlx_dsa.train.loop import IndexerRun, new_indexers
from mlx_dsa.train.retention import RetentionRun, new_heads
from mlx_dsa.train.retention_config import RetentionScore
from mlx_dsa.train.state import TrainState
from mlx_dsa.train.together import BothRun, BothScore, BothState, new_modules

SMALL = INDEXERS | dict(index_n_heads=4)
HEADS = dict(retention_dim=2, min_distance=4)


def configs(**changed):
    values = SMALL | HEADS | changed
    common = {k: v for k, v in values.items() if k in RunConfig.__dataclass_fields__}
    heads = {k: v for k, v in values.items() if k in ("repeat_share", *HEADS)}
    own = {k: v for k, v in values.items() if k not in heads}
    return TrainConfig(**own), RetentionConfig(**common, **heads)


def run(tmp_path, model=None, *, name="out", data=None, **options):
    how = {k: options.pop(k) for k in ("resume", "progress") if k in options}
    data, out = data or write_text(tmp_path), tmp_path / name
    model = model or make_model()
    return train_together(model, make_tokenizer(), data, out, *configs(**options), **how)


def chats(n=6, length=60):
    rng = np.random.default_rng(0)
    focus = np.arange(length // 2, length, dtype=np.int32)
    return [Sequence(rng.integers(0, 100, length, dtype=np.int32), focus) for _ in range(n)]


def steps_of(run, n=4):
    return [run.take_step() for _ in range(n)]


def test_each_learns_as_it_does_alone():
    """Of the same sequences, with norms so small that every gradient is clipped."""
    model = make_model()
    config, retention = configs(max_grad_norm=1e-3, repeat_share=0.0)
    lessons = make_lessons(chats(), retention)
    modules = new_modules(model, config, retention)
    state = BothState(modules, config, BothScore)
    losses = steps_of(BothRun(model, config, retention, state, lessons, []))

    indexers = new_indexers(model, config)
    of_indexers = TrainState(indexers, config, LayerScore)
    apart = steps_of(IndexerRun(model, config, of_indexers, chats(), []))
    heads = new_heads(indexers, retention)
    of_heads = TrainState(heads, retention, RetentionScore)
    others = steps_of(RetentionRun(model, retention, of_heads, lessons, []))

    assert losses == pytest.approx(np.add(apart, others), abs=1e-5)
    fresh = new_modules(model, config, retention)
    for layer, module in modules.items():
        together = dict(tree_flatten(module.parameters()))
        wanted = dict(tree_flatten(indexers[layer].parameters()))
        wanted |= {f"retention.{n}": p for n, p in tree_flatten(heads[layer].parameters())}
        assert set(together) == set(wanted)
        before = dict(tree_flatten(fresh[layer].parameters()))
        for key, value in wanted.items():
            moved = mx.abs(value - before[key]).max()
            assert mx.abs(together[key] - value).max() < 0.02 * moved, key


def test_the_model_reads_each_text_once(tmp_path, monkeypatch):
    read = []
    original = loop_module.layer_views

    def counting(model, tokens, chunk_size):
        read.append(tokens.shape[0])
        return original(model, tokens, chunk_size)

    monkeypatch.setattr(loop_module, "layer_views", counting)
    run(tmp_path, steps=3, eval_every=10)
    # Before the first step and after the last the two held-out texts, and three batches.
    assert sorted(read) == [1] * 4 + [2] * 3


def test_both_learn_and_the_file_says_so(tmp_path):
    seen = []
    changed = dict(steps=120, eval_every=40, learning_rate=1e-2, retention_dim=4)
    result = run(tmp_path, progress=seen.append, **changed)
    first, last = seen[0].held_out, seen[-1].held_out
    for layer in first:
        assert last[layer].loss < first[layer].loss
        assert last[layer].head_loss < first[layer].head_loss
    assert sorted(os.listdir(tmp_path / "out")) == ["indexers.safetensors", "run_config.json"]
    loaded = load_indexers(result.path)
    assert sorted(loaded) == [0, 1] and loaded[0].args.unweighted
    assert loaded[0].args.retention_dim == 4
    stored = json.loads((tmp_path / "out" / "run_config.json").read_text())
    config, retention = configs(**changed)
    assert stored["retention_dim"] == 4
    assert stored["train"] == asdict(config) and stored["retention"]["train"] == asdict(retention)
    for told, kind, which in ((stored, LayerScore, 0), (stored["retention"], RetentionScore, 1)):
        assert set(told["held_out"]["1"]) == {"best_step", *kind._fields}
        assert told["held_out"]["1"]["best_step"] == result.best_steps[1][which]


def score(loss, head_loss):
    return BothScore(loss, 0.5, loss, 1.0, head_loss, head_loss, 0.5)


def test_indexer_and_head_have_their_own_best_steps():
    model = make_model(layers=1)
    config, retention = configs()
    state = BothState(new_modules(model, config, retention), config, BothScore)
    kept = {}
    for step, losses in enumerate([(3.0, 3.0), (2.0, 4.0), (5.0, 1.0)]):
        state.step = step
        state.modules[0].wk.bias = mx.full(state.modules[0].wk.bias.shape, step)
        state.modules[0].retention.up.bias = mx.full((2,), step)
        state.keep_best({0: score(*losses)})
        kept[step] = list(state.best_steps[0])
    assert kept == {0: [0, 0], 1: [1, 0], 2: [1, 2]}
    assert state.best_scores[0] == (2.0, 0.5, 2.0, 1.0, 1.0, 1.0, 0.5)
    best = state.best_modules()[0]
    assert (best.wk.bias == 1).all() and (best.retention.up.bias == 2).all()


@pytest.mark.parametrize("stop", [0, 3, 6])
def test_resumes_to_the_same_file(stop, tmp_path):
    def stops(progress):
        if progress.step == stop:
            raise KeyboardInterrupt

    run(tmp_path, name="whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, name="cut", progress=stops)
    assert not (tmp_path / "cut" / "indexers.safetensors").exists()
    run(tmp_path, name="cut", resume=True)
    for name in ("indexers.safetensors", "run_config.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_resume_refuses_other_heads(tmp_path):
    def stops(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=stops)
    with pytest.raises(ValueError, match="another retention: retention_dim is 2 there and 1 here"):
        run(tmp_path, resume=True, retention_dim=1)


def test_neither_goes_on_as_the_other(tmp_path):
    """Indexers alone and both may have the same config and the same data."""

    def stops(progress):
        raise KeyboardInterrupt

    data, (config, _) = write_text(tmp_path), configs(top_k=40)
    alone = make_model(), make_tokenizer(), data
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, data=data, progress=stops, top_k=40)
    with pytest.raises(ValueError, match="another retention: set there and None here"):
        train_indexers(*alone, tmp_path / "out", config, resume=True)
    with pytest.raises(KeyboardInterrupt):
        train_indexers(*alone, tmp_path / "alone", config, progress=stops)
    with pytest.raises(ValueError, match="another retention: None there and set here"):
        run(tmp_path, name="alone", data=data, resume=True, top_k=40)
    train_indexers(*alone, tmp_path / "alone", config, resume=True)  # as itself it does


def test_a_text_that_would_lose_its_last_key_is_not_read_twice(tmp_path):
    """Of 33 tokens, twice 16 are no more than a top_k of 32: nothing there to choose."""
    changed = dict(top_k=32, sequence_length=33, steps=20, batch_size=1)
    seen = []
    run(tmp_path, progress=seen.append, **changed)
    assert {(now.tokens - 33 * now.step) for now in seen} == {0}
    with pytest.raises(ValueError, match="must give more than held_out"):
        run(tmp_path, name="twice", repeat_share=1.0, **changed)


def test_what_they_share_must_agree():
    config, _ = configs()
    _, retention = configs(learning_rate=0.5)
    with pytest.raises(ValueError, match="'learning_rate' must be the same .* 0.002 and 0.5"):
        train_together(None, None, "x", "y", config, retention)


def test_a_large_head_is_refused_before_the_data_is_read(tmp_path):
    with pytest.raises(ValueError, match="'retention_dim' must be at most"):
        run(tmp_path, retention_dim=60, data=tmp_path / "none.txt")
    assert not (tmp_path / "out").exists()
