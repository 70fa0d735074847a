"""Which layers bear being sparse."""

import json
import sys

import pytest
from click.testing import CliRunner
from evals_subject import make_subject

from mlx_dsa import SparseConfig
from mlx_dsa.cli import main
from mlx_dsa.evals import Policy, coverage, ppl, retrieval
from mlx_dsa.evals.layer_coverage import coverage_tables, plot_coverage, propose

module = sys.modules["mlx_dsa.evals.layer_coverage"]
OPTIONS = dict(top_k=48, length=160, limit=2, queries=8)


@pytest.fixture(scope="module")
def subject():
    return make_subject(n_recent=8)


@pytest.fixture(scope="module")
def result(subject):
    return coverage(subject, **OPTIONS)


def ratio(subject, dense_layers):
    config = SparseConfig(top_k=48, n_recent=8, cache="full", prefill="exact", dense_layers=dense_layers)
    found = ppl(subject, [Policy("p", config)], length=160, limit=2)
    return next(p["ratio"] for p in found["pairs"] if p["against"] == "dense")


def test_a_layers_loss_is_that_of_the_model_in_which_it_alone_is_sparse(subject, result):
    assert [r["layer"] for r in result["rows"]] == [0, 1]
    for row, others in zip(result["rows"], ([1], [0])):
        assert row["ratio"] == pytest.approx(ratio(subject, others), abs=1e-9)
    assert result["rows"][0]["ratio"] != result["rows"][1]["ratio"]


def test_the_curve_goes_from_all_sparse_to_dense(subject, result):
    worst = max(result["rows"], key=lambda r: r["ratio"])["layer"]
    curve = result["pairs"]
    assert [p["dense_layers"] for p in curve] == [[], [worst], [0, 1]]
    assert curve[0]["ratio"] == pytest.approx(ratio(subject, []), abs=1e-9)
    assert curve[1]["ratio"] == pytest.approx(ratio(subject, [worst]), abs=1e-9)
    assert curve[2]["ratio"] == 1 and curve[0]["ratio"] != 1


def test_mass_is_that_of_the_selection(subject, result):
    config = SparseConfig(top_k=48, n_recent=8, cache="full", prefill="exact")
    found = retrieval(subject._replace(config=config), top_k=[48], length=160, limit=2, queries=8, select=["window"])
    masses = {(r["policy"], r["layer"]): r["mass_value"] for r in found["rows"]}
    for row in result["rows"]:
        assert row["mass"] == masses["index", row["layer"]] != masses["attention", row["layer"]]
        assert row["mass_over"] == row["mass"] / masses["attention", row["layer"]]
    window = coverage(subject, select="window", **OPTIONS)
    assert [r["mass"] for r in window["rows"]] == [masses["select:window", i] for i in (0, 1)]


@pytest.mark.parametrize("within, expected", [(10, []), (4, [2]), (1, [0, 2]), (0.5, [0, 1, 2])])
def test_the_fewest_dense_layers_are_proposed(within, expected):
    ratios = [(1.05, []), (1.03, [2]), (1.008, [0, 2]), (1.0, [0, 1, 2])]
    assert propose([{"ratio": r, "dense_layers": d} for r, d in ratios], within) == expected


def test_it_goes_on_where_it_was_interrupted(subject, result, tmp_path, monkeypatch):
    out, calls = tmp_path / "c.json", []

    def stopped(*args, out, **options):
        calls.append(out.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return ppl(*args, out=out, **options)

    monkeypatch.setattr(module, "ppl", stopped)
    with pytest.raises(KeyboardInterrupt):
        coverage(subject, out=out, **OPTIONS)
    assert calls == ["c.alone.json", "c.curve.json"] and not out.exists()
    made = (tmp_path / "c.alone.json").stat().st_mtime_ns
    whole = coverage(subject, out=out, **OPTIONS)
    assert (tmp_path / "c.alone.json").stat().st_mtime_ns == made
    assert [whole[k] for k in ("rows", "pairs", "proposal")] == [result[k] for k in ("rows", "pairs", "proposal")]
    monkeypatch.setattr(module, "ppl", None)  # what is there is not made again
    assert coverage(subject, out=out, **OPTIONS) == json.loads(out.read_text())
    with pytest.raises(ValueError, match="holds another run"):
        coverage(subject, out=out, **{**OPTIONS, "within": 2.0})


def test_what_it_refuses(subject):
    with pytest.raises(ValueError, match="'within' must be at least 0"):
        coverage(subject, **OPTIONS, within=-1)
    one = subject._replace(config=SparseConfig(top_k=64, n_recent=8, dense_layers=(0,)))
    with pytest.raises(ValueError, match="fewer than two layers"):
        coverage(one, **OPTIONS)


def test_tables_and_picture(result, tmp_path):
    (_, layers), (_, curve) = coverage_tables(result)
    assert [row[0] for row in layers] == ["0", "1"] and [row[1] for row in curve][::2] == ["-", "0 1"]
    plot_coverage(result, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command(subject, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["mlx_dsa.cli.eval.coverage"], "load_settings", lambda settings: subject)
    out = tmp_path / "c.json"
    options = ["--top-k", "48", "--lengths", "160", "--limit", "1", "--queries", "4", "--out", str(out)]
    done = CliRunner().invoke(main, ["eval", "coverage", *options])
    assert done.exit_code == 0, done.output
    assert f'"dense_layers": {json.loads(out.read_text())["proposal"]}' in done.output
    wrong = CliRunner().invoke(main, ["eval", "coverage", "--select", "best"])
    assert wrong.exit_code == 2 and "must be one of" in wrong.output
