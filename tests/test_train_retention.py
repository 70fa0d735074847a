"""Retention heads: what they learn from, that they learn it, and that memory stays bounded."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from builders import SHAPES, build_model, make_indexers, make_model
from mlx.utils import tree_flatten
from test_train import make_tokenizer, view_of, write_text

from mlx_dsa import load_indexers, save_indexers
from mlx_dsa.train import RetentionConfig, train_retention
from mlx_dsa.train import teacher as teacher_module
from mlx_dsa.train.data import Sequence
from mlx_dsa.train.lessons import make_lessons, stack_queries
from mlx_dsa.train.retention import retention_loss, retention_score
from mlx_dsa.train.teacher import attention_target, future_attention, layer_views

SMALL = dict(
    steps=6,
    sequence_length=64,
    batch_size=2,
    retention_dim=2,
    min_distance=4,
    held_out=2,
    eval_every=2,
    checkpoint_every=2,
    warmup_steps=2,
    chunk_size=24,
)


def write_indexers(model, folder, **options):
    return save_indexers(folder, make_indexers(model, **options), {"note": "kept"})


# --- the target ----------------------------------------------------------------


@pytest.mark.parametrize("shape", ["gqa2", "mqa"])
def test_target_is_the_largest_later_attention(shape):
    view, _ = view_of(make_model(**SHAPES[shape]))
    rows = np.array([[9, 30, 41, 47], [3, 20, 20, 20]], np.int32)
    found = np.array(future_attention(view, rows, 5))
    queries, keys = (np.array(a, np.float64) for a in (view.queries, view.keys))
    keys = keys.repeat(queries.shape[1] // keys.shape[1], axis=1)
    expected = np.zeros((2, 48))
    for b in range(2):
        for row in rows[b]:
            logits = np.einsum("hd,htd->ht", queries[b, :, row], keys[b, :, : row + 1])
            p = np.exp(logits * view.scale)
            p = (p / p.sum(-1, keepdims=True)).max(0)[: max(0, row - 5)]
            expected[b, : len(p)] = np.maximum(expected[b, : len(p)], p)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (expected[1] > 0).sum() == 15


def test_target_does_not_depend_on_its_blocks(monkeypatch):
    view, _ = view_of(make_model())
    rows = np.arange(48, dtype=np.int32)[None].repeat(2, axis=0)
    whole = future_attention(view, rows, 3)
    monkeypatch.setattr(teacher_module, "_BLOCK_BYTES", 4 * 2 * 4 * 48 * 5)
    assert mx.allclose(future_attention(view, rows, 3), whole, atol=1e-7)


# --- the lessons ---------------------------------------------------------------


def sequence(length, focus=()):
    return Sequence(np.arange(length, dtype=np.int32), np.array(focus, np.int32))


def test_half_of_the_queries_come_after_every_key():
    config = RetentionConfig(**SMALL | dict(repeat_share=0.0))
    asked = [*range(40, 50), *range(90, 100)]
    text, chat = make_lessons([sequence(100), sequence(100, asked)], config)
    assert text.queries.tolist() == list(range(5, 100))
    assert chat.queries.tolist() == asked
    for lesson in (text, chat):
        after = (lesson.queries >= lesson.n_keys + config.min_distance).mean()
        assert 0.5 <= after < 0.6
    assert stack_queries([text, chat]).shape == (2, 95)
    assert set(stack_queries([text, chat])[1]) == set(asked)


def test_a_repeated_text_is_looked_at_by_its_second_reading():
    config = RetentionConfig(**SMALL | dict(repeat_share=1.0))
    (lesson,) = make_lessons([sequence(101, [70])], config)
    assert lesson.tokens.tolist() == [*range(50), *range(50)]
    assert lesson.queries.tolist() == list(range(50, 100)) and lesson.n_keys == 50


def test_the_seed_decides_what_is_repeated():
    sequences = [sequence(100)] * 200

    def repeated(seed, share=0.3):
        config = RetentionConfig(**SMALL | dict(seed=seed, repeat_share=share))
        return [lesson.tokens[-1] < 99 for lesson in make_lessons(sequences, config)]

    assert repeated(0) == repeated(0) != repeated(1)
    assert 0.2 < np.mean(repeated(0)) < 0.4
    assert not any(repeated(0, 0.0)) and all(repeated(0, 1.0))


# --- the loss ------------------------------------------------------------------


def test_loss_and_agreement_look_at_the_learnt_keys_alone():
    target = np.arange(64)[None] / 64
    learnt = mx.arange(64)[None] < 32
    scores = np.where(learnt, target * 4 - 2, 99.0)
    score = retention_score(mx.array(scores), mx.array(target), learnt)
    p, t = 1 / (1 + np.exp(-scores[:, :32])), target[:, :32]
    entropy = -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
    assert score == (pytest.approx(entropy, abs=1e-6), 1.0, 1.0)
    scores[0, [0, 31]] = scores[0, [31, 0]]
    score = retention_score(mx.array(scores), mx.array(target), learnt)
    assert (score.agreement_16, score.agreement_8) == (0.5, 0.75)
    sure = mx.array(np.where(t > 0.25, 30.0, -30.0))
    held = retention_loss(sure, mx.array(np.round(t * 2)), learnt[:, :32])
    assert held.item() == pytest.approx(0, abs=1e-6)


# --- the config ----------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        dict(steps=0),
        dict(repeat_share=1.5),
        dict(learning_rate=0),
        dict(min_distance=8),
    ],
)
def test_bad_config(changed):
    name = "sequence_length" if "min_distance" in changed else next(iter(changed))
    with pytest.raises(ValueError, match=rf"\[RetentionConfig\] '{name}'"):
        RetentionConfig(**SMALL | changed)


def test_unknown_config_key():
    with pytest.raises(ValueError, match="'top_k'"):
        RetentionConfig.from_dict({"top_k": 8})


# --- the run -------------------------------------------------------------------


def run(model, tmp_path, *, data=None, name="out", indexers=None, resume=False, **changed):
    progress = changed.pop("progress", None)
    return train_retention(
        model,
        make_tokenizer(),
        data or write_text(tmp_path),
        tmp_path / name,
        RetentionConfig(**SMALL | changed),
        indexers=indexers or write_indexers(model, tmp_path / "indexers"),
        resume=resume,
        progress=progress,
    )


@pytest.mark.parametrize("shape", ["gqa2", "4bit", "moe-4bit"])
def test_heads_learn_and_are_added_to_the_indexers(shape, tmp_path):
    model = make_model(**SHAPES[shape])
    before = [mx.array(p) for _, p in tree_flatten(model.parameters())]
    seen = []
    changed = dict(steps=150, eval_every=50, learning_rate=1e-2, retention_dim=8)
    indexers = write_indexers(model, tmp_path / "indexers", n_heads=8)
    result = run(model, tmp_path, indexers=indexers, progress=seen.append, **changed)
    first, last = seen[0].held_out, seen[-1].held_out
    for layer in first:
        assert last[layer].loss < first[layer].loss
        assert last[layer].agreement_8 > first[layer].agreement_8
    with_heads, without = load_indexers(result.path), load_indexers(indexers)
    assert sorted(with_heads) == list(range(len(model.layers)))
    for layer, indexer in with_heads.items():
        assert indexer.has_retention and indexer.retention(mx.zeros((2, 3, 64))).shape == (2, 3)
        parameters = dict(tree_flatten(indexer.parameters()))
        for key, value in tree_flatten(without[layer].parameters()):
            assert mx.array_equal(parameters[key], value)
    assert sorted(os.listdir(tmp_path / "out")) == ["indexers.safetensors", "run_config.json"]
    stored = json.loads((tmp_path / "out" / "run_config.json").read_text())
    assert stored["note"] == "kept" and stored["retention_dim"] == 8
    assert stored["retention"]["held_out"]["0"]["best_step"] == result.best_steps[0]
    after = [p for _, p in tree_flatten(model.parameters())]
    assert all(mx.array_equal(a, b) for a, b in zip(before, after))


def test_layers_without_an_indexer_get_no_head_and_heads_are_replaced(tmp_path):
    model = make_model(layers=3)
    some = write_indexers(model, tmp_path / "some", layers=[0, 2])
    first = run(model, tmp_path, indexers=some)
    again = run(model, tmp_path, indexers=first.path.parent, name="again", seed=1)
    old, new = load_indexers(first.path), load_indexers(again.path)
    assert sorted(old) == sorted(new) == [0, 2]
    assert not mx.array_equal(old[2].retention.up.weight, new[2].retention.up.weight)
    assert mx.array_equal(old[2].wq.weight, new[2].wq.weight)


def test_a_large_head_and_foreign_indexers_are_refused(tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match="'retention_dim' must be at most 10"):
        run(model, tmp_path, retention_dim=11)
    other = write_indexers(make_model(hidden=48), tmp_path / "other")
    with pytest.raises(ValueError, match="layer 0 of width 48"):
        run(model, tmp_path, indexers=other)
    deep = write_indexers(make_model(layers=3), tmp_path / "deep")
    with pytest.raises(ValueError, match="layer 2 of width 64"):
        run(model, tmp_path, indexers=deep)
    assert not (tmp_path / "out").exists()


def test_short_texts_are_refused(tmp_path):
    (tmp_path / "few.txt").write_text("abc " * 5)
    with pytest.raises(ValueError, match="longer than 8 \\* min_distance = 32"):
        run(make_model(), tmp_path, data=tmp_path / "few.txt")


def test_resume_refuses_other_indexers(tmp_path):
    model = make_model()

    def stop(progress):
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path, progress=stop)
    other = write_indexers(model, tmp_path / "other", seed=5)
    with pytest.raises(ValueError, match="another indexers"):
        run(model, tmp_path, indexers=other, resume=True)
    assert run(model, tmp_path, resume=True).path.exists()


CHILD = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import mlx_dsa
from builders import make_model
from test_train_retention import SMALL, make_tokenizer
from mlx_dsa.train import RetentionConfig, train_retention

when, out, data, indexers = sys.argv[1:]

def progress(p):
    if when == "die" and p.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)

train_retention(make_model(), make_tokenizer(), data, out, RetentionConfig(**SMALL),
                indexers=indexers, resume=when == "resume", progress=progress)
"""


def test_resumes_to_the_same_heads_after_kill_9(tmp_path):
    data = write_text(tmp_path)
    indexers = write_indexers(make_model(), tmp_path / "indexers")
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def child(how, out):
        code = CHILD.format(tests=str(Path(__file__).parent))
        arguments = [how, str(out), str(data), str(indexers)]
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
            capture_output=True,
            text=True,
        )

    done = child("whole", whole)
    assert done.returncode == 0, done.stderr
    assert child("die", killed).returncode == -signal.SIGKILL
    assert not (killed / "indexers.safetensors").exists()
    done = child("resume", killed)
    assert done.returncode == 0, done.stderr
    for name in ("indexers.safetensors", "run_config.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


# --- memory --------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_model():
    """A random 4-bit model of 2 layers with the widths of Qwen3-8B, but for its MLP: no head sees that."""
    config = dict(
        model_type="qwen3",
        hidden_size=4096,
        num_hidden_layers=2,
        intermediate_size=512,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rms_norm_eps=1e-6,
        vocab_size=101,
        tie_word_embeddings=False,
        rope_theta=1e6,
        max_position_embeddings=40960,
    )
    return build_model(config, seed=None, norms=False, bits=4, group_size=64, dtype=mx.float32)


def test_heads_train_beside_a_4bit_model_of_8b_widths(wide_model, tmp_path):
    published = dict(n_heads=6, head_dim=69, rope_dim=64)
    indexers = write_indexers(wide_model, tmp_path / "indexers", **published)
    changed = dict(steps=1, sequence_length=40, held_out=1, batch_size=1, retention_dim=97)
    result = run(wide_model, tmp_path, indexers=indexers, chunk_size=16, **changed)
    assert set(result.scores) == {0, 1}
    assert load_indexers(result.path)[0].args.retention_dim == 97


def test_memory_stays_below_the_square_of_the_length(wide_model, monkeypatch):
    length, block = 512, 2 << 20
    monkeypatch.setattr(teacher_module, "_BLOCK_BYTES", block)
    tokens = mx.random.randint(0, 100, (1, length))
    _, view = next(iter(layer_views(wide_model, tokens, 128)))
    rows = np.arange(length, dtype=np.int32)[None]
    mx.eval(view)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(future_attention(view, rows, 32))
    square = 4 * 32 * length * length
    copies = 2 * view.keys.nbytes
    assert mx.get_peak_memory() - before < copies + 5 * block < square / 2
    assert attention_target(view, mx.array(rows[:, :4])).shape == (1, 4, length)
