"""Training of search projections: its loss against NumPy, that it learns, and that it resumes."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from builders import SHAPES, make_model
from click.testing import CliRunner
from local_models import write_model
from test_train import make_tokenizer, view_of, write_text

from mlx_dsa import patch_sparse_generate
from mlx_dsa.cli import main
from mlx_dsa.search import load_projections
from mlx_dsa.train import ProjectionsConfig, train_projections
from mlx_dsa.train.loss import open_keys
from mlx_dsa.train.projections import ProjectionsRun, new_projections, row_products, search_loss

CONFIG = ProjectionsConfig(
    steps=6, sequence_length=64, batch_size=2, top_k=16, n_sink=1, n_recent=2, query_rows=16,
    held_out=2, eval_every=2, checkpoint_every=2, warmup_steps=2, chunk_size=24, search_dim=8,
    positives=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return make_model(**SHAPES["gqa2"])


def expected_loss(view, module, rows, config, by_mean=False):
    """The loss of one row at a time, in float64."""
    x, keys, queries = (np.array(a, dtype=np.float64) for a in (view.x, view.keys, view.queries))
    wq, wk = (np.array(w.weight, dtype=np.float64) for w in (module.wq, module.wk))
    losses = []
    for b, row in ((i, int(r)) for i in range(len(x)) for r in np.array(rows)[i]):
        groups = queries.shape[1] // keys.shape[1]
        logits = [queries[b, h, row] @ keys[b, h // groups, : row + 1].T for h in range(queries.shape[1])]
        heads = np.exp(np.array(logits) * view.scale)
        heads /= heads.sum(-1, keepdims=True)
        target = heads.mean(0) if by_mean else heads.max(0)
        target /= target.sum()
        free = np.arange(config.n_sink, row - config.n_recent + 1)
        q, k = wq @ x[b, row], x[b, free] @ wk.T
        cosines = np.exp(k @ q / np.linalg.norm(q) / np.linalg.norm(k, axis=-1) / config.temperature)
        best = np.argsort(-target[free])[: config.positives]
        contrast = -np.log(cosines[best].sum() / cosines.sum())
        student = np.exp(k @ q / np.sqrt(len(q)))
        own, mass = target[free] / target[free].sum(), target[free].sum()
        losses.append(contrast + config.kl_weight * mass * (own * np.log(own / (student / student.sum()))).sum())
    return np.mean(losses)


@pytest.mark.parametrize("change", [{}, dict(n_sink=0, n_recent=0), dict(kl_weight=0.25, positives=9)])
def test_the_loss_against_numpy(model, change):
    config = replace(CONFIG, **change)
    view, _ = view_of(model)
    module = new_projections(model, config)[0]
    module.wq.weight, module.wk.weight = module.wq.weight * 9, module.wk.weight * 9
    rows = mx.array([[17, 30, 47], [20, 21, 40]])
    run = ProjectionsRun(model, config, None, [], [])
    found = run.loss(module, view, rows, run.target(view, rows)).item()
    assert found == pytest.approx(expected_loss(view, module, rows, config), rel=1e-4)
    assert found != pytest.approx(expected_loss(view, module, rows, config, by_mean=True), rel=1e-3)
    score = run.score(module, view, rows)
    assert score.loss == pytest.approx(found, rel=1e-5) and 0 < score.mass <= score.best_mass < 1


def test_a_row_that_is_paid_nothing_where_it_may_choose_counts_for_nothing(model):
    view, _ = view_of(model)
    rows = mx.array([[17, 30], [20, 21]])
    products, cosines = row_products(new_projections(model, CONFIG)[0], view.x, rows)
    target = mx.zeros(cosines.shape)
    target[..., 0] = 1.0  # the sink
    is_open = open_keys(rows, cosines.shape[-1], CONFIG)
    assert search_loss(products, cosines, target, is_open, CONFIG).item() == pytest.approx(0, abs=1e-6)
    every = open_keys(rows, cosines.shape[-1], replace(CONFIG, n_sink=0))
    assert search_loss(products, cosines, target, every, CONFIG).item() > 1


def test_it_learns_and_its_file_selects(model, tmp_path):
    config = replace(CONFIG, steps=40, eval_every=40, checkpoint_every=40, learning_rate=1e-2)
    told = []
    result = train_projections(
        model, make_tokenizer(), write_text(tmp_path), tmp_path / "out", config, progress=told.append
    )
    before, after = told[0].held_out, told[-1].held_out
    for layer in (0, 1):
        assert after[layer].loss < 0.9 * before[layer].loss
        assert after[layer].mass > before[layer].mass
    projections = load_projections(result.path)
    assert list(projections) == [0, 1] and projections[0].args.index_head_dim == 8
    with patch_sparse_generate(model, projections, 16, n_recent=4, select="projections", cache="full"):
        assert mx.isfinite(model(mx.arange(40)[None])).all()


def test_a_run_that_is_stopped_goes_on_to_the_same_end(model, tmp_path):
    data, tokenizer = write_text(tmp_path), make_tokenizer()
    whole = train_projections(model, tokenizer, data, tmp_path / "whole", CONFIG)

    def stop(progress):
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_projections(model, tokenizer, data, tmp_path / "cut", CONFIG, progress=stop)
    cut = train_projections(model, tokenizer, data, tmp_path / "cut", CONFIG, resume=True)
    assert cut.scores == whole.scores
    for one, other in zip(load_projections(cut.path).values(), load_projections(whole.path).values()):
        assert mx.array_equal(one.wq.weight, other.wq.weight)
        assert mx.array_equal(one.wk.weight, other.wk.weight)
    other = train_projections(model, tokenizer, data, tmp_path / "other", replace(CONFIG, seed=1))
    assert other.scores != whole.scores


@pytest.mark.parametrize(
    "change, told",
    [
        (dict(top_k=6), "at least n_sink . n_recent . positives = 7 but got 6"),
        (dict(top_k=64), "'sequence_length' must exceed top_k = 64"),
        (dict(temperature=0), "'temperature' must be above 0"),
        (dict(positives=0), "'positives' must be a whole number of at least 1"),
        (dict(kl_weight=-1), "'kl_weight' must be a number of at least 0"),
    ],
)
def test_bad_settings_are_refused(change, told):
    with pytest.raises(ValueError, match=told):
        replace(CONFIG, **change)


def test_the_command(tmp_path):
    model = write_model(tmp_path / "model")

    def run(*more):
        words = ["train", "--model", model, "--data", tmp_path / "text.txt", "--out", tmp_path / "out", *more]
        return CliRunner().invoke(main, [str(word) for word in words])

    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten. " * 60)
    for options, told in (
        (["--rule", "projections", "--both"], "leave --both out"),
        (["--rule", "projections", "--retention"], "leave --retention out"),
        (["--rule", "projections", "--index-n-heads", "2"], "--index-n-heads goes without --rule projections"),
        (["--rule", "projections", "--retention-dim", "2"], "--retention-dim goes without --rule projections"),
        (["--positives", "2"], "--positives goes with --rule projections"),
        (["--retention-dim", "2"], "--retention-dim goes with --retention or --both"),
    ):
        result = run(*options)
        assert result.exit_code == 2 and told in result.output, result.output
    small = "--steps 2 --sequence-length 48 --top-k 16 --n-recent 2 --positives 4 --search-dim 8 --held-out 1"
    result = run("--rule", "projections", *small.split())
    assert result.exit_code == 0, result.output
    assert "--select projections" in result.output
    assert load_projections(tmp_path / "out")[1].args.index_head_dim == 8
