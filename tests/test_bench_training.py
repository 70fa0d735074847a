"""Timing of training: what counts, what is left as it was, what is written."""

import gc
import json

import mlx.core as mx
import pytest
from builders import make_model
from click.testing import CliRunner
from mlx.utils import tree_flatten

from mlx_dsa.bench import BENCH_SHAPES, bench_training, random_model
from mlx_dsa.bench.models import BenchShape
from mlx_dsa.bench.training import PARTS, TRAINED
from mlx_dsa.cli import main
from mlx_dsa.families import family_of
from mlx_dsa.train import RetentionConfig, TrainConfig
from mlx_dsa.train.loop import TrainRun

SMALL = BenchShape(384, 2, 128, 4, 2, 32, 101, True, (2, 12, 8), 16)
CONFIG = TrainConfig(sequence_length=64, top_k=40, n_sink=1, n_recent=2, query_rows=8, index_n_heads=8)
RETENTION = RetentionConfig(sequence_length=64, retention_dim=4, min_distance=2)


@pytest.fixture
def small_shape(monkeypatch):
    monkeypatch.setitem(BENCH_SHAPES, "tiny", SMALL)


@pytest.fixture(scope="module")
def model():
    return make_model()


def rows_of(model, contexts, **options):
    return list(bench_training(model, contexts, CONFIG, RETENTION, **options))


class Clock:
    """Seconds that pass only where a test says so: at each view, and at each step."""

    def __init__(self, monkeypatch, teacher, learning):
        self.now = 0.0
        monkeypatch.setattr(TrainRun, "views", self.costs(TrainRun.views, teacher))
        take_step = TrainRun.take_step
        costs = iter(learning)

        def slow(run):
            self.now += next(costs)
            return take_step(run)

        monkeypatch.setattr(TrainRun, "take_step", slow)

    def costs(self, views, seconds):
        def slow(run, batch):
            for view in views(run, batch):
                self.now += seconds
                yield view

        return slow

    def __call__(self):
        return self.now


def test_parts_and_medians_on_a_fake_clock(model, monkeypatch):
    # Of the first step, which does not count, 1,000 s; two layers in every step.
    clock = Clock(monkeypatch, 2, [1000, 3, 50, 5])
    (row,) = rows_of(model, [64], of=["indexers"], steps=3, clock=clock)
    assert row["parts_s"] == pytest.approx({"teacher": 4, "targets": 0, "learning": 5})
    assert row["step_s"] == pytest.approx(9)
    assert row["tokens_s"] == pytest.approx(64 / 9)
    assert row["hours_10m_tokens"] == pytest.approx(1e7 * 9 / 64 / 3600)


@pytest.mark.parametrize(
    "kind, name",
    [
        ("indexers", "attention_target"),
        ("retention", "future_attention"),
        ("both", "attention_target"),
        ("both", "future_attention"),
    ],
)
def test_targets_are_a_part_of_their_own(model, monkeypatch, kind, name):
    from mlx_dsa.train import loop, retention

    clock = Clock(monkeypatch, 0, [0, 0])
    module = loop if name == "attention_target" else retention
    original = getattr(module, name)

    def slow(*arguments):
        clock.now += 7
        return original(*arguments)

    monkeypatch.setattr(module, name, slow)
    (row,) = rows_of(model, [64], of=[kind], steps=1, clock=clock)
    assert row["parts_s"] == pytest.approx({"teacher": 0, "targets": 14, "learning": 0})


def test_every_context_and_kind_has_a_row(model):
    told = []
    rows = rows_of(model, [40, 64], of=TRAINED, steps=1, progress=lambda *now: told.append(now))
    kinds = [(context, kind) for context in (40, 64) for kind in TRAINED]
    assert [(row["context"], row["of"]) for row in rows] == kinds
    assert [now[0] for now in told] == list(range(13))  # a step that warms up, and one
    assert {now[1] for now in told} == {12}
    for row in rows:
        assert set(row["parts_s"]) == set(PARTS) and min(row["parts_s"].values()) > 0
        assert row["step_s"] > 0 and row["peak_memory_gb"] > 0


def test_the_peak_is_that_of_its_own_steps(model):
    """A long context first: what it needed must not be told of a short one."""
    gc.collect()
    before = mx.get_active_memory() / 1e9  # what earlier tests of this process still hold
    long, short = rows_of(model, [2048, 40], of=["indexers"], steps=1)
    assert 0 < short["peak_memory_gb"] - before < (long["peak_memory_gb"] - before) / 4


def test_the_model_is_left_as_it_was(model):
    before = {name: mx.array(a) for name, a in tree_flatten(model.parameters())}
    rows_of(model, [64], steps=1)
    for name, array in tree_flatten(model.parameters()):
        assert mx.array_equal(array, before[name]), name


@pytest.mark.parametrize("context, words", [(16, "at least 17"), (5000, "4,096 positions")])
def test_contexts_that_do_not_fit_are_refused(model, context, words):
    with pytest.raises(ValueError, match=words):
        rows_of(model, [64, context])


@pytest.mark.parametrize(
    "name, kind, heads, dim, theta",
    [
        ("qwen2.5-coder-0.5b", "qwen2", (14, 2), 64, 1e6),
        ("smollm2-135m", "llama", (9, 3), 64, 1e5),
    ],
)
def test_shapes_of_other_families(monkeypatch, name, kind, heads, dim, theta):
    cut = BENCH_SHAPES[name]._replace(n_layers=1, vocab_size=128)
    monkeypatch.setitem(BENCH_SHAPES, name, cut)
    model, indexers = random_model(name)
    assert model.model_type == kind
    layer = family_of(model).layers(model)[0]
    assert ((layer.n_heads, layer.n_kv_heads), layer.head_dim) == (heads, dim)
    assert layer.rope.theta == theta and layer.bits == 4
    assert ("bias" in layer.module.q_proj) == (kind == "qwen2")
    assert indexers[0].args.index_head_dim == 64
    logits = model(mx.array([[1, 2, 3]]))
    assert mx.isfinite(logits).all() and logits.std().item() > 0


# The command.


def run(*arguments):
    options = ["--model-shape", "tiny", "--bits", "16", "--chunk", "64"]
    given = ["bench", "--train", *options, *map(str, arguments)]
    return CliRunner().invoke(main, given)


def test_the_command_writes_what_it_measured(small_shape, tmp_path):
    out = tmp_path / "new" / "training.json"
    result = run("--contexts", "300", "--steps", 1, "--out", out)
    assert result.exit_code == 0, result.output
    last = json.loads(out.read_text())
    assert set(last) == {"rows", "training", "config", "device", "versions"}
    assert [row["of"] for row in last["rows"]] == ["both"]
    assert last["config"]["steps"] == 1 and last["training"]["chunk_size"] == 64
    assert not out.with_suffix(".jsonl").exists()
    assert "10M tokens" in result.stdout and " h" in result.stdout


def test_kinds_apart(small_shape):
    result = run("--contexts", "300", "--steps", 1, "--of", "retention", "--of", "indexers")
    assert result.exit_code == 0, result.output
    last = json.loads(result.stdout.splitlines()[-1])
    assert [row["of"] for row in last["rows"]] == ["retention", "indexers"]


@pytest.mark.parametrize(
    "options, code, words",
    [
        (("--ops",), 2, "no effect"),
        (("--plot", "x.png"), 2, "no effect"),
        (("--repeats", "2"), 2, "no effect"),
        (("--cold", "x"), 2, "--cold has no effect"),
        (("--evict", "window"), 2, "--evict has no effect"),
        (("--top-k", "100"), 2, "--top-k has no effect"),
        (("--of", "heads"), 2, "heads"),
        (("--contexts", "16"), 1, "at least 257"),
        (("--contexts", "2000000"), 1, "positions"),
    ],
)
def test_bad_input_is_one_line(small_shape, options, code, words):
    result = run(*options)
    errors = [line for line in result.output.splitlines() if line.startswith("Error")]
    assert result.exit_code == code, result.output
    assert len(errors) == 1 and words in errors[0]


def test_what_goes_with_train_alone(small_shape):
    result = CliRunner().invoke(main, ["bench", "--model-shape", "tiny", "--of", "both"])
    assert result.exit_code == 2 and "--of goes with --train" in result.output
