"""Dense against sparse: passes in turns, medians, rows, what is written."""

import json
import sys
import time

import mlx.core as mx
import pytest
from builders import make_indexers, make_model, make_tokens
from click.testing import CliRunner

from mlx_dsa import SparseConfig
from mlx_dsa.bench import BENCH_SHAPES, bench, bench_rows, check_contexts, end_to_end, models, random_model
from mlx_dsa.bench.models import BenchShape
from mlx_dsa.cli import main
from mlx_dsa.cli.subject import open_subject
from mlx_dsa.presets import resolve

command = sys.modules["mlx_dsa.cli.bench"]  # cli.bench is the command
CONFIG = dict(top_k=24, n_sink=2, n_recent=8, tile_size=8, evict="index")
SMALL = BenchShape(64, 2, 128, 4, 2, 32, 101, True, (2, 12, 8), 16)
KEYS = {
    "prefill_s", "prefill_tokens_s", "ttft_s", "decode_ms", "active_memory_gb",
    "peak_memory_gb",
}  # fmt: skip


@pytest.fixture(scope="module")
def subject():
    model = make_model()
    return model, make_indexers(model), SparseConfig(**CONFIG)


@pytest.fixture
def small_shape(monkeypatch):
    monkeypatch.setitem(BENCH_SHAPES, "tiny", SMALL)


class Clock:
    """Seconds that pass by what is called: `cost[kind]` at each reading."""

    def __init__(self, costs):
        self.costs = iter(costs)
        self.now = 0.0

    def __call__(self):
        self.now += next(self.costs, 1.0)
        return self.now


def test_passes_are_taken_in_turns(subject):
    lines = []
    rows = list(bench(*subject, [30, 40], repeats=2, steps=1, report=lines.append))
    order = [(line["context"], line["repeat"], line["kind"]) for line in lines]
    assert order == [
        (context, repeat, kind) for context in (30, 40) for repeat in range(2) for kind in ("dense", "sparse")
    ]
    assert [row["context"] for row in rows] == [30, 40]
    assert all(len(line["decode_ms"]) == 1 for line in lines)  # a whole block


def test_medians_and_speedups_on_a_fake_clock(subject):
    # Readings of a pass: start, prompt read, first token, blocks begin, one block ends.
    warm_up = [0, 9, 9, 9]
    passes = [
        [0, 3, 1, 5, 25.6], [0, 2, 1, 5, 12.8],
        [0, 6, 1, 5, 38.4], [0, 1, 1, 5, 6.4],
        [0, 5, 1, 5, 2.56], [0, 9, 3, 5, 25.6],
    ]  # fmt: skip
    clock = Clock(sum([warm_up, warm_up, *passes], []))
    (row,) = bench(*subject, [41], repeats=3, steps=256, clock=clock)
    dense, sparse = row["dense"], row["sparse"]
    assert (dense["prefill_s"], sparse["prefill_s"]) == pytest.approx((5, 2))
    assert (dense["ttft_s"], sparse["ttft_s"]) == pytest.approx((6, 3))
    assert (dense["decode_ms"], sparse["decode_ms"]) == pytest.approx((100, 50))
    assert dense["prefill_tokens_s"] == pytest.approx(40 / 5)
    assert row["speedup"] == pytest.approx({"prefill": 2.5, "ttft": 2, "decode": 2})
    assert next(clock.costs, None) is None  # no reading was left over


def test_decode_counts_whole_blocks(subject):
    lines = []
    list(bench(*subject, [30], repeats=1, steps=257, report=lines.append))
    assert [len(line["decode_ms"]) for line in lines] == [2, 2]


def test_a_dense_model_is_not_charged_for_indexers(subject, monkeypatch):
    from mlx_dsa.bench import end_to_end

    plain = [r["dense"] for r in bench(*subject, [30], repeats=1, steps=1)][0]
    monkeypatch.setattr(end_to_end, "_nbytes", lambda indexers: 10**9)
    less = [r["dense"] for r in bench(*subject, [30], repeats=1, steps=1)][0]
    for name in ("active_memory_gb", "peak_memory_gb"):
        assert plain[name] - less[name] == pytest.approx(1, abs=0.01)


def test_the_model_is_left_as_it_was(subject):
    model = subject[0]
    attentions = [layer.self_attn for layer in model.layers]
    list(bench(*subject, [30], repeats=1, steps=1))
    assert [layer.self_attn for layer in model.layers] == attentions
    assert not hasattr(model, "make_cache")


def test_contexts_beyond_the_positions_are_refused(subject):
    with pytest.raises(ValueError, match="4,096 positions"):
        list(bench(*subject, [30, 4090]))
    after = 8 + 256 + 1  # steps that warm up, a block, and the one that mlx-lm is ahead
    check_contexts([4096 - after], 1, subject[0])
    with pytest.raises(ValueError, match="room for 265 steps"):
        check_contexts([4097 - after], 1, subject[0])


def test_the_positions_are_those_of_the_steps_that_are_taken(subject):
    runner = end_to_end._Runner(*subject, 64, time.perf_counter)
    with runner._patched("sparse") as patch:
        caches = patch.make_cache()
        runner._time(caches, make_tokens(30)[0], 256)
    assert {cache.offset for cache in caches} == {30 + 265}


def test_contexts_of_a_single_token_are_refused(subject):
    with pytest.raises(ValueError, match="at least 2"):
        list(bench(*subject, [1]))


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_random_models_have_the_shape_and_the_bits(small_shape, bits):
    model, indexers = random_model("tiny", bits)
    projection = model.layers[1].self_attn.q_proj
    assert getattr(projection, "bits", 16) == bits
    assert sorted(indexers) == [0, 1]
    assert indexers[0].args.index_head_dim == 12 and indexers[0].has_retention
    x = model.layers[0].self_attn.q_proj(mx.random.normal((1, 50, 64)))
    assert 0.5 < x.std().item() < 2  # of order one, as the input
    logits = model(mx.array([[1, 2, 3]]))
    assert mx.isfinite(logits).all() and logits.std().item() > 0


def test_packed_weights_use_all_their_bits(small_shape):
    weight = random_model("tiny", 4)[0].layers[0].mlp.up_proj.weight
    for shift in range(0, 32, 4):
        digits = (weight >> shift) & 15
        assert len(set(digits.flatten().tolist())) == 16


def test_shapes_are_those_of_the_published_models():
    qwen3 = {"qwen3-8b", "qwen3-4b", "qwen3-0.6b", "tiny"}
    assert set(BENCH_SHAPES) == {*qwen3, "qwen2.5-coder-0.5b", "smollm2-135m"}
    shape = BENCH_SHAPES["qwen3-8b"]
    # The published indexers: 2,003,427 parameters a layer.
    n_heads, dims, _ = shape.indexer
    width = n_heads * dims + dims
    assert (shape.hidden_size + 1) * width + shape.hidden_size * n_heads == 2_003_427


@pytest.mark.parametrize("shape, bits", [("qwen", 4), ("tiny", 5)])
def test_unknown_shapes_and_bits_are_refused(shape, bits):
    with pytest.raises(ValueError, match=r"\[bench\] '(model_shape|bits)' must be one of"):
        models.random_model(shape, bits)


# The command.


@pytest.mark.parametrize(
    "preset, model, with_config, name",
    [
        (None, None, False, "preset tiny"),
        ("qwen3-8b", None, False, "preset qwen3-8b"),
        (None, "an/other", False, "an/other"),
        (None, None, True, "its/own"),
        ("tiny", None, True, "its/own"),
        (None, "an/other", True, "an/other"),
    ],
)
def test_a_model_is_called_what_the_user_called_it(preset, model, with_config, name, tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"model": "its/own", "top_k": 300}))
    config = str(file) if with_config else None
    given = dict(preset=preset, model=model, indexer=None, config=config)
    subject = open_subject(model_shape=None, bits=None, **given)
    assert subject.name == name
    assert (subject.config.top_k == 300) == with_config


def test_a_shape_runs_with_the_settings_of_its_preset():
    given = dict.fromkeys(("preset", "model", "indexer", "config"))
    subject = open_subject(model_shape="qwen3-8b", bits=None, **given)
    assert subject.config == resolve("qwen3-8b").config != SparseConfig()
    assert open_subject(model_shape="qwen3-8b", bits=None, top_k=1024, **given).config.top_k == 1024


def run(*arguments):
    options = {"--model-shape": "tiny", "--bits": "16", "--repeats": "1"}
    given = [word for pair in options.items() if pair[0] not in arguments for word in pair]
    return CliRunner().invoke(main, ["bench", *given, *map(str, arguments)])


def test_without_a_file_the_last_line_is_one_json(small_shape):
    result = run("--contexts", "80", "--top-k", 100, "--steps", 1, "--chunk", 64)
    assert result.exit_code == 0, result.output
    last = json.loads(result.stdout.splitlines()[-1])
    assert set(last) == {"rows", "passes", "config", "device", "versions"}


def test_a_file_holds_the_whole_result(small_shape, tmp_path):
    out, plot = tmp_path / "new" / "bench.json", tmp_path / "bench.png"
    result = run(
        "--contexts", "80,200", "--top-k", 100, "--steps", 1, "--chunk", 64,
        "--out", out, "--plot", plot,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-2:] == [f"Wrote {out}", f"Wrote {plot}"]
    assert "{" not in result.stdout
    last = json.loads(out.read_text())
    assert set(last) == {"rows", "passes", "config", "device", "versions"}
    measured = [(p["context"], p["kind"]) for p in last["passes"]]
    assert measured == [(n, kind) for n in (80, 200) for kind in ("dense", "sparse")]
    assert [row["context"] for row in last["rows"]] == [80, 200]
    for row in last["rows"]:
        assert set(row["dense"]) == set(row["sparse"]) == KEYS
        assert {"prefill", "decode", "ttft"} <= set(row["speedup"])
    assert last["config"]["top_k"] == 100 and last["config"]["model"].startswith("random")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert not out.with_suffix(".jsonl").exists()
    notes = [line for line in result.stderr.splitlines() if line.startswith("Note: 80 ")]
    assert len(notes) == 1 and "sparse attention is dense there" in notes[0]


def test_what_is_too_long_for_dense_is_timed_alone(subject, small_shape, tmp_path):
    lines = []
    rows = list(bench(*subject, [30, 40], repeats=2, steps=1, beside_dense=False, report=lines.append))
    assert {line["kind"] for line in lines} == {"sparse"} and len(lines) == 4
    assert [set(row) for row in rows] == [{"context", "prefill", "sparse"}] * 2
    out, plot = (str(tmp_path / name) for name in ("alone.json", "alone.png"))
    options = ["--model-shape", "tiny", "--top-k", "24", "--n-recent", "8", "--contexts", "40"]
    options += ["--repeats", "1", "--steps", "1", "--alone", "--out", out, "--plot", plot]
    result = CliRunner().invoke(main, ["bench", *options])
    assert result.exit_code == 0, result.output
    assert "dense" not in result.output and "speed-up" not in result.output
    assert (tmp_path / "alone.png").stat().st_size > 1000
    refused = CliRunner().invoke(main, ["bench", "--train", "--alone", "--model-shape", "tiny"])
    assert refused.exit_code == 2 and "--alone has no effect with --train" in refused.output


def test_an_interruption_leaves_what_was_measured(small_shape, tmp_path, monkeypatch):
    def stops(*arguments, report, **given):
        report({"context": 80, "kind": "dense", "decode_ms": [1.0], "ttft_s": 1.0})
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(command, "run_bench", stops)
    result = run("--contexts", 80, "--out", tmp_path / "bench.json")
    assert result.exit_code == 130 and "Stopped." in result.output
    (line,) = (tmp_path / "bench.jsonl").read_text().splitlines()
    assert json.loads(line)["context"] == 80
    assert not (tmp_path / "bench.json").exists()


def test_operations_of_a_shape(small_shape, tmp_path):
    result = run(
        "--ops", "--contexts", "250,400", "--top-k", 100, "--chunk", 128,
        "--out", tmp_path / "ops.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    last = json.loads((tmp_path / "ops.json").read_text())
    assert [row["context"] for row in last["rows"]] == [250, 400]
    assert last["shape"]["index_head_dim"] == 12
    assert all(row["gather"] > 0 and row["floor"]["sdpa"] > 0 for row in last["rows"])


@pytest.mark.parametrize(
    "options, code, words",
    [
        (("--contexts", "4k"), 2, "whole numbers"),
        (("--contexts", "0"), 2, "below 1"),
        (("--contexts", "2000000"), 1, "positions"),
        (("--model-shape", "qwen9"), 2, "qwen9"),
        (("--model", "somewhere"), 2, "exclude each other"),
        (("--bits", "5"), 2, "5"),
        (("--top-k", "3"), 1, "--top-k"),
        (("--ops", "--plot", "x.png"), 2, "no effect"),
        (("--ops", "--contexts", "100"), 1, "contexts"),
        (("--out", "/proc/none/x.json"), 1, "/proc/none"),
    ],
)
def test_bad_input_is_one_line(small_shape, options, code, words):
    result = run(*options)
    errors = [line for line in result.output.splitlines() if line.startswith("Error")]
    assert result.exit_code == code, result.output
    assert len(errors) == 1 and words in errors[0]
    assert "Traceback" not in result.output


def test_rows_are_timed_in_turns_and_in_numbers_that_hold(subject):
    model, indexers, config = subject
    lines = []
    found = list(bench_rows(model, indexers, config, [40], [1, 3], repeats=2, steps=4, report=lines.append))
    assert [(line["rows"], line["kind"]) for line in lines] == [
        (rows, kind) for rows in (1, 3) for _ in range(2) for kind in ("dense", "sparse")
    ]
    for row in found:
        for kind in ("dense", "sparse"):
            assert row[kind]["tokens_s"] == pytest.approx(1e3 * row["rows"] / row[kind]["decode_ms"], rel=0.5)
        assert row["speedup"] == pytest.approx(row["dense"]["decode_ms"] / row["sparse"]["decode_ms"])
    alone = list(bench_rows(model, indexers, config, [40], [2], repeats=1, steps=4, beside_dense=False))
    assert "dense" not in alone[0] and "speedup" not in alone[0]


def test_rows_on_the_command_line(small_shape, tmp_path):
    options = "--model-shape tiny --top-k 24 --n-recent 8 --contexts 40 --repeats 1 --steps 4"
    out = tmp_path / "rows.json"
    result = CliRunner().invoke(main, ["bench", *options.split(), "--rows", "1,2", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert [row["rows"] for row in json.loads(out.read_text())["rows"]] == [1, 2]
    assert "tokens/s" in result.output
    result = CliRunner().invoke(main, ["bench", "--rows", "2", "--ops"])
    assert result.exit_code == 2 and "--rows has no effect with --ops" in result.output
