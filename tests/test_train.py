"""The trainer: what it learns from, that it learns, and that it resumes to the same run."""

import gc
import gzip
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from builders import SHAPES, layer_of, letters_tokenizer, make_indexers, make_model, make_tokens

from mlx_dsa import load_indexers, patch_sparse_generate
from mlx_dsa.families.family import Family
from mlx_dsa.train import TrainConfig, train_indexers
from mlx_dsa.train import teacher as teacher_module
from mlx_dsa.train.data import Sequence, load_sequences, sample_rows
from mlx_dsa.train.loss import distillation_loss, layer_score, open_keys, row_scores
from mlx_dsa.train.sources import read_rows
from mlx_dsa.train.state import check_out
from mlx_dsa.train.teacher import attention_target, layer_views

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
SMALL = dict(
    steps=6,
    sequence_length=64,
    batch_size=2,
    top_k=8,
    n_sink=1,
    n_recent=2,
    index_n_heads=2,
    index_head_dim=8,
    index_rope_dim=4,
    query_rows=16,
    held_out=2,
    eval_every=2,
    checkpoint_every=2,
    warmup_steps=2,
    chunk_size=24,
)


def make_tokenizer():
    return letters_tokenizer(TEMPLATE)


def write_text(folder, length=4000, seed=0):
    words = ["".join(random.Random(i).choices("abcdefgh", k=4)) for i in range(20)]
    text = " ".join(random.Random(seed).choices(words, k=length // 5))
    path = Path(folder) / "text.txt"
    path.write_text(text)
    return path


def view_of(model, length=48, chunk_size=16, layer=-1):
    tokens = mx.random.randint(0, 100, (2, length), key=mx.random.key(5))
    return [view for _, view in layer_views(model, tokens, chunk_size)][layer], tokens


# --- the teacher ---------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_views_are_what_attention_receives(shape, monkeypatch):
    model = make_model(**SHAPES[shape])
    views, tokens = [], mx.random.randint(0, 100, (2, 40), key=mx.random.key(5))
    seen = []
    attention = type(model.layers[0].self_attn)
    original = attention.__call__
    monkeypatch.setattr(attention, "__call__", lambda self, x, *a: seen.append(x) or original(self, x, *a))
    model(tokens)
    monkeypatch.undo()
    for chunk_size in (40, 7, 1):
        views = [view for _, view in layer_views(model, tokens, chunk_size)]
        assert len(views) == len(seen) == len(model.layers)
        for view, x in zip(views, seen):
            assert mx.allclose(view.x, x.astype(mx.float32), atol=1e-4)


def test_keys_and_values_of_earlier_layers_are_let_go(monkeypatch):
    model, made = make_model(layers=3), []
    make_caches = Family.make_caches
    keep = lambda *a: made.append(make_caches(*a)) or made[-1]  # noqa: E731
    monkeypatch.setattr(Family, "make_caches", keep)
    held = []  # tokens of each layer's cache, None where it is gone
    for _ in layer_views(model, make_tokens(40), 16):
        held.append([cache and cache.offset for cache in made[0]])
    assert held == [[0, 0, 0], [None, 0, 0], [None, None, 0]]


@pytest.mark.parametrize("shape", ["gqa2", "mqa", "yarn", "moe"])
def test_target_is_the_models_own_attention(shape):
    model = make_model(**SHAPES[shape])
    view, _ = view_of(model)
    rows = mx.array([[0, 9, 47], [3, 9, 30]])
    target = np.array(attention_target(view, rows))
    queries, keys = (np.array(a, np.float64) for a in (view.queries, view.keys))
    keys = keys.repeat(queries.shape[1] // keys.shape[1], axis=1)
    for b in range(2):
        for r, row in enumerate(np.array(rows)[b]):
            logits = np.einsum("hd,htd->ht", queries[b, :, row], keys[b, :, : row + 1])
            p = np.exp(logits * view.scale - (logits * view.scale).max(-1, keepdims=True))
            p = (p / p.sum(-1, keepdims=True)).sum(0)
            np.testing.assert_allclose(target[b, r, : row + 1], p / p.sum(), atol=1e-6)
            assert (target[b, r, row + 1 :] == 0).all()


def test_target_does_not_depend_on_its_blocks(monkeypatch):
    view, _ = view_of(make_model())
    rows = mx.broadcast_to(mx.arange(20, 48), (2, 28))
    whole = attention_target(view, rows)
    monkeypatch.setattr(teacher_module, "_BLOCK_BYTES", 4 * 2 * 4 * 48 * 5)
    assert mx.allclose(attention_target(view, rows), whole, atol=1e-7)


def test_memory_stays_below_the_square_of_the_length(tmp_path):
    length, heads = 4096, 8
    model = make_model(hidden=32, heads=heads, kv_heads=2, head_dim=16)
    data = write_text(tmp_path, 3 * length)
    config = TrainConfig(
        **SMALL | dict(steps=1, sequence_length=length, chunk_size=64, query_rows=32) | dict(held_out=1, batch_size=1)
    )
    gc.collect()
    before = mx.get_active_memory()  # models that fixtures of other tests hold
    mx.reset_peak_memory()
    train_indexers(model, make_tokenizer(), data, tmp_path / "out", config)
    assert mx.get_peak_memory() - before < heads * length * length * 4 / 10


# --- the loss ------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
def test_row_scores_are_the_indexers_scores(norm):
    model = make_model()
    view, _ = view_of(model)
    indexer = make_indexers(model, norm=norm)[0].bind(layer_of(model), mx.float32)
    rows = mx.array([[5, 20, 20], [0, 1, 47]])
    full = indexer.scores(view.x, indexer.project_keys(view.x))
    got = row_scores(indexer, view.x, rows)
    for b in range(2):
        for r, row in enumerate(rows[b].tolist()):
            assert mx.allclose(got[b, r, : row + 1], full[b, row, : row + 1], atol=1e-5)
            assert (got[b, r, row + 1 :] < -1e29).all().item()


def test_loss_is_the_divergence_and_zero_at_the_target():
    rng = np.random.default_rng(0)
    target = rng.dirichlet(np.ones(12), (1, 3))
    scores = rng.normal(size=(1, 3, 12))
    q = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    kl = (target * np.log(target / q)).sum(-1).mean()
    best = np.argsort(-target, axis=-1)[..., :4]
    support = -np.log(np.take_along_axis(q, best, -1).sum(-1)).mean()
    s, t = mx.array(scores, mx.float32), mx.array(target, mx.float32)
    config = TrainConfig(**SMALL | dict(top_k=4, n_sink=0, n_recent=0))
    rows = mx.array([[11, 11, 11]])
    is_open = open_keys(rows, 12, config)
    assert is_open.all().item()
    assert distillation_loss(s, t, is_open, config).item() == pytest.approx(kl, abs=1e-5)
    with_support = replace(config, support_weight=0.5)
    assert distillation_loss(s, t, is_open, with_support).item() == pytest.approx(kl + 0.5 * support, abs=1e-5)
    exact = distillation_loss(mx.log(t), t, is_open, config).item()
    assert exact == pytest.approx(0, abs=1e-5)


def test_loss_over_open_keys_is_their_part_of_the_divergence():
    rng = np.random.default_rng(0)
    target, scores = rng.dirichlet(np.ones(12), (1, 2)), rng.normal(size=(1, 2, 12))
    rows = np.array([[11, 9]])
    for r, row in enumerate(rows[0]):
        target[0, r, row + 1 :] = 0
    config = TrainConfig(**SMALL | dict(n_sink=2, n_recent=3))
    expected = []
    for r, row in enumerate(rows[0]):
        keys = slice(2, row - 2)
        t, s = target[0, r, keys], scores[0, r, keys]
        p, q = t / t.sum(), np.exp(s) / np.exp(s).sum()
        expected.append(t.sum() * (p * np.log(p / q)).sum())
    s, t = mx.array(scores, mx.float32), mx.array(target, mx.float32)
    is_open = open_keys(mx.array(rows), 12, config)
    got = distillation_loss(s, t, is_open, config).item()
    assert got == pytest.approx(np.mean(expected), abs=1e-5)


@pytest.mark.parametrize("forced, recall, mass", [((0, 0), 0.5, 0.4), ((1, 0), 1.0, 0.8)])
def test_recall_and_mass(forced, recall, mass):
    n_sink, n_recent = forced
    target = mx.array([[[0.5, 0.3, 0.1, 0.06, 0.04]]])
    scores = mx.array([[[1.0, 5.0, 4.0, 0.0, -1.0]]])
    config = TrainConfig(**SMALL | dict(top_k=2, n_sink=n_sink, n_recent=n_recent))
    is_open = open_keys(mx.array([[4]]), 5, config)
    score = layer_score(scores, target, is_open, config)
    assert score.recall == pytest.approx(recall)
    assert score.mass == pytest.approx(mass)
    assert score.best_mass == pytest.approx(0.8)


# --- the data ------------------------------------------------------------------


def test_text_is_joined_and_cut(tmp_path):
    rows = [{"text": "a" * 30}, {"text": "b" * 30 + "\n"}, {"text": "c" * 10}]
    plain, zipped = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    lines = "\n".join(map(json.dumps, rows)) + "\n\n"
    plain.write_text(lines)
    zipped.write_bytes(gzip.compress(lines.encode()))
    tokenizer = make_tokenizer()
    expected = tokenizer.encode("a" * 30 + "\n\n" + "b" * 30 + "\n" + "c" * 10 + "\n\n")
    for path in (plain, zipped):
        sequences = load_sequences(path, tokenizer, 25, 4, 100)
        assert [len(s.tokens) for s in sequences] == [25, 25, 25]
        assert np.concatenate([s.tokens for s in sequences]).tolist() == expected
    assert len(load_sequences(plain, tokenizer, 25, 4, 2)) == 2


def test_a_local_folder_is_read_as_a_dataset(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "abc"}\n{"text": "def"}\n')
    assert [row["text"] for row in read_rows(tmp_path)] == ["abc", "def"]


def test_conversations_stay_whole_and_mark_their_replies(tmp_path):
    chats = [
        [
            {"role": "user", "content": "x" * 40 + " bob. who?"},
            {"role": "assistant", "content": "bob."},
        ],
        [
            {"role": "user", "content": "y" * 20},
            {"role": "assistant", "content": "one"},
            {"role": "user", "content": "z" * 60},
            {"role": "assistant", "content": "two"},
        ],
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps({"messages": m}) for m in chats))
    tokenizer = make_tokenizer()
    texts = [tokenizer.apply_chat_template(m, tokenize=False) for m in chats]
    both = load_sequences(path, tokenizer, 256, 8, 10)
    assert [tokenizer.decode(s.tokens).replace(" ", "") for s in both] == ["".join(texts).replace(" ", "")]
    apart = load_sequences(path, tokenizer, 140, 8, 10)
    assert [len(s.tokens) for s in apart] == [len(t) for t in texts]
    end = texts[0].rindex("bob.") + 4
    assert apart[0].focus.tolist() == list(range(end - 4 - 32, end))
    assert set(range(texts[1].index("two"), texts[1].index("two") + 3)) <= set(apart[1].focus.tolist())
    (cut,) = load_sequences(path, tokenizer, 40, 30, 1)
    assert len(cut.tokens) == 40 and cut.focus[-1] == 40 - 2


def test_rows_see_more_than_top_k_keys_and_favour_the_focus():
    focus = np.arange(90, 100, dtype=np.int32)
    sequence = Sequence(np.zeros(400, np.int32), focus)
    rows = sample_rows(sequence, 40, 64, 0.5, np.random.default_rng(0))
    assert rows.shape == (40,) and rows.min() >= 64 and rows.max() < 400
    assert np.isin(rows, focus).sum() >= 20
    rows = sample_rows(sequence, 40, 200, 0.5, np.random.default_rng(0))
    assert rows.min() >= 200


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("empty.txt", "", "no text"),
        ("short.txt", "abc", "longer than top_k"),
        ("few.txt", "abc " * 20, "held_out"),
        ("bytes.txt", b"\xff\xfe\x00abc", "cannot be read"),
        ("bad.jsonl", '{"text": "a"}\nnot json\n', "line 2"),
        ("other.jsonl", '{"body": "a"}\n', "'body'"),
        ("roles.jsonl", '{"messages": [{"role": "user"}, 3]}\n', "row 1"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:30], "cannot be read"),
        ("table.csv", "a,b", ".jsonl"),
        ("missing.txt", None, "there is no file"),
        ("missing-folder", None, "cannot be read"),
    ],
)
def test_bad_data_is_one_clear_line(tmp_path, name, content, reason):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=reason) as error:
        train_indexers(make_model(), make_tokenizer(), path, out, TrainConfig(**SMALL))
    assert "\n" not in str(error.value)
    assert not out.exists()


# --- the config ----------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        dict(steps=0),
        dict(batch_size=True),
        dict(top_k=64),
        dict(top_k=3),
        dict(focus_share=1.5),
        dict(learning_rate=0),
        dict(weight_decay=float("nan")),
        dict(warmup_steps=-1),
    ],
)
def test_bad_config(changed):
    with pytest.raises(ValueError, match=next(iter(changed)).split("_")[0]):
        TrainConfig(**SMALL | changed)


def test_unknown_config_key():
    with pytest.raises(ValueError, match="'topk'"):
        TrainConfig.from_dict({"topk": 8})


# --- the run -------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["gqa2", "4bit", "moe-4bit"])
def test_training_learns_and_is_loaded_by_every_layer(shape, tmp_path):
    model = make_model(**SHAPES[shape])
    before = [mx.array(p) for _, p in flat(model)]
    seen = []
    config = TrainConfig(**SMALL | dict(steps=150, eval_every=50, learning_rate=1e-2))
    result = train_indexers(
        model,
        make_tokenizer(),
        write_text(tmp_path),
        tmp_path / "out",
        config,
        progress=seen.append,
    )
    assert [p.step for p in seen] == list(range(151))
    first, last = seen[0].held_out, seen[-1].held_out
    for layer in first:
        assert last[layer].loss < 0.7 * first[layer].loss
        assert last[layer].recall > first[layer].recall
        assert last[layer].mass <= last[layer].best_mass
    indexers = load_indexers(result.path)
    assert sorted(indexers) == list(range(len(model.layers)))
    assert sorted(os.listdir(tmp_path / "out")) == ["indexers.safetensors", "run_config.json"]
    stored = json.loads((tmp_path / "out" / "run_config.json").read_text())
    assert stored["held_out"]["0"]["best_step"] == result.best_steps[0]
    assert all(mx.array_equal(a, b) for a, (_, b) in zip(before, flat(model)))


def flat(model):
    from mlx.utils import tree_flatten

    return tree_flatten(model.parameters())


def test_each_layer_keeps_its_best_step(tmp_path):
    model = make_model()
    history = []
    config = TrainConfig(**SMALL | dict(steps=12, learning_rate=1.0, eval_every=1))
    result = train_indexers(
        model,
        make_tokenizer(),
        write_text(tmp_path),
        tmp_path / "out",
        config,
        progress=lambda p: history.append(p.held_out),
    )
    for layer, score in result.scores.items():
        losses = [scores[layer].loss for scores in history]
        assert score.loss == min(losses)
        assert result.best_steps[layer] == losses.index(min(losses))
    assert set(result.best_steps.values()) != {12}


CHILD = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import mlx_dsa
from builders import make_model
from test_train import SMALL, make_tokenizer
from mlx_dsa.train import TrainConfig, train_indexers

when, out, data = sys.argv[1:]
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
replace, saves = os.replace, []

def dying_replace(old, new):
    saves.append(new)
    if len(saves) == 3:  # the checkpoint of step 4 is written but not in place
        die()
    replace(old, new)

def progress(p):
    if when == "between" and p.step == 5:
        die()

if when == "saving":
    os.replace = dying_replace
train_indexers(make_model(), make_tokenizer(), data, out, TrainConfig(**SMALL),
               resume=when == "resume", progress=progress)
"""


@pytest.mark.parametrize("when", ["between", "saving"])
def test_resumes_to_the_same_weights_after_kill_9(tmp_path, when):
    data = write_text(tmp_path)

    def child(how, out):
        code = CHILD.format(tests=str(Path(__file__).parent))
        root = str(Path(__file__).parent.parent)
        return subprocess.run(
            [sys.executable, "-c", code, how, str(out), str(data)],
            env={**os.environ, "PYTHONPATH": root},
            capture_output=True,
            text=True,
        )

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = child("whole", whole)
    assert done.returncode == 0, done.stderr
    assert child(when, killed).returncode == -signal.SIGKILL
    assert not (killed / "indexers.safetensors").exists()
    with pytest.raises(ValueError, match="unfinished run"):
        train_indexers(make_model(), make_tokenizer(), data, killed, TrainConfig(**SMALL))
    done = child("resume", killed)
    assert done.returncode == 0, done.stderr
    for name in ("indexers.safetensors", "run_config.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(os.listdir(killed)) == sorted(os.listdir(whole))


# --- what is never overwritten -------------------------------------------------


def interrupted(tmp_path, **changed):
    data, out = write_text(tmp_path), tmp_path / "out"

    def stop(progress):
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_indexers(make_model(), make_tokenizer(), data, out, TrainConfig(**SMALL), progress=stop)
    return data, out


def test_an_interruption_between_steps_is_saved(tmp_path):
    """Of steps that take a minute, those since the last checkpoint would be lost."""
    data, out = interrupted(tmp_path)  # after 3 steps; a checkpoint is written every 2
    config, seen = TrainConfig(**SMALL), []
    train_indexers(make_model(), make_tokenizer(), data, out, config, resume=True, progress=seen.append)
    assert seen[0].step == 3


def test_resume_refuses_another_run(tmp_path):
    data, out = interrupted(tmp_path)
    before = (out / "checkpoint.safetensors").read_bytes()
    other = TrainConfig(**SMALL | dict(seed=1))
    with pytest.raises(ValueError, match="another config: seed is 0 there and 1 here"):
        train_indexers(make_model(), make_tokenizer(), data, out, other, resume=True)
    config = TrainConfig(**SMALL)
    with pytest.raises(ValueError, match="another model"):
        train_indexers(make_model(seed=9), make_tokenizer(), data, out, config, resume=True)
    write_text(tmp_path, seed=1)
    with pytest.raises(ValueError, match="another data"):
        train_indexers(make_model(), make_tokenizer(), data, out, config, resume=True)
    assert (out / "checkpoint.safetensors").read_bytes() == before


def test_resume_refuses_a_damaged_checkpoint(tmp_path):
    data, out = interrupted(tmp_path)
    file = out / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a checkpoint"):
        config = TrainConfig(**SMALL)
        train_indexers(make_model(), make_tokenizer(), data, out, config, resume=True)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["indexers.safetensors", "notes.txt"])
def test_a_folder_with_something_else_is_refused(tmp_path, name, resume):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(ValueError, match="finished|new or empty"):
        train_indexers(
            make_model(),
            make_tokenizer(),
            write_text(tmp_path),
            out,
            TrainConfig(**SMALL),
            resume=resume,
        )
    assert (out / name).read_text() == "mine" and os.listdir(out) == [name]


def test_a_folder_that_is_empty_but_for_what_systems_leave_there_is_taken(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    left = [".DS_Store", "Thumbs.db", "desktop.ini", "._.DS_Store"]
    for name in left:
        (out / name).write_bytes(b"\0")
    check_out(out, resume=False)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="new or empty folder but it holds notes.txt"):
        check_out(out, resume=False)
    (out / "notes.txt").unlink()
    (out / "checkpoint.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="unfinished run"):
        check_out(out, resume=False)
    check_out(out, resume=True)
    assert sorted(os.listdir(out)) == sorted([*left, "checkpoint.safetensors"])


def test_an_unsupported_model_is_refused(tmp_path):
    model = make_model()
    model.model_type = "phi"
    with pytest.raises(ValueError, match="qwen3_5_moe but got 'phi'"):
        train_indexers(model, make_tokenizer(), write_text(tmp_path), tmp_path / "o", TrainConfig(**SMALL))


def test_a_patched_model_is_refused(tmp_path):
    model = make_model()
    patch_sparse_generate(model, make_indexers(model), top_k=80)
    with pytest.raises(ValueError, match="must be unpatched"):
        train_indexers(model, make_tokenizer(), write_text(tmp_path), tmp_path / "o", TrainConfig(**SMALL))
