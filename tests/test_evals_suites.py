"""What is wrong with a suite is said before the work of its first run."""

import functools
import json
import sys
from dataclasses import replace

import pytest
from evals_subject import make_subject

from mlx_dsa.evals import evaluator, read_suite, run_suite

NEEDLE = dict(name="n", kind="needle", lengths=[256], depths=[0.5], limit=1, max_tokens=2)
POLICIES = ["dense", {"policy": "retention", "top_k": 64}]
RUNS = [
    {**NEEDLE, "policies": POLICIES},
    {"name": "p", "kind": "ppl", "length": 150, "limit": 1, "policies": [{"policy": "full", "top_k": 64}]},
    {"name": "r", "kind": "retrieval", "length": 100, "limit": 1, "queries": 4, "top_k": [32]},
]


def table(*cells):
    return {"title": "t", "columns": ["a"] * len(cells), "rows": {"row": [list(cell) for cell in cells]}}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Return what makes a suite, and notes the evaluators that were begun."""
    begun = []
    for kind in evaluator.evaluator_kinds():
        known = evaluator.evaluator_of(kind)

        @functools.wraps(known.run)
        def noting(*args, known=known, **options):
            begun.append(known.kind)
            return known.run(*args, **options)

        monkeypatch.setitem(evaluator._EVALUATORS, kind, replace(known, run=noting))

    def make(**suite):
        file = tmp_path / "suite.json"
        file.write_text(json.dumps({"runs": RUNS, **suite}))
        subject = make_subject(retention_dim=4, n_recent=16, prefill="dense")
        return run_suite(subject, read_suite(file), tmp_path / "out")

    make.begun, make.out = begun, tmp_path / "out"
    return make


def test_a_table_of_every_kind_of_run(make):
    shown = table(("n", "dense"), ("n", "retention@64"), ("p", "full@64"), ("r", 32))
    make(tables=[shown], pictures=[{"name": "picture", "runs": ["n"]}])
    assert make.begun == ["needle", "ppl", "retrieval"]
    lines = (make.out / "report.md").read_text().splitlines()
    (row,) = (line for line in lines if line.startswith("| row |"))
    assert row.count("|") == 6 and "worst" in row


def test_a_table_of_what_drops_nothing(make):
    """Where top_k is no smaller than the text, there is no perplexity to compare."""
    policies = [{"policy": "full", "top_k": k} for k in (64, 200)]
    run = {**RUNS[1], "policies": policies}
    make(runs=[run], tables=[table(("p", "full@64"), ("p", "full@200"))])
    assert "| - |" in next(x for x in (make.out / "report.md").read_text().splitlines() if "| row |" in x)


@pytest.mark.parametrize(
    "suite, message",
    [
        (dict(tables=[table(("n", "retention@65"))]), "run 'n' has no 'retention@65': it has dense, ret"),
        (dict(tables=[table(("r", 64))]), "run 'r' has no 64: it has 32"),
        (dict(tables=[table(("p", "dense"))]), "run 'p' has no 'dense'"),
        (dict(tables=[table(("q", "dense"))]), "there is no run 'q'"),
        (dict(tables=[table(("n", "dense", 3))]), "must be a run and a policy"),
        (dict(tables=[{"title": "t", "rows": {}}]), "must have a list as 'columns'"),
        (dict(tables=["t"]), "must have a text as 'title'"),
        (dict(pictures=[{"runs": ["n"]}]), "must have a text as 'name'"),
        (dict(pictures=[{"name": "a", "runs": ["p"]}]), "must be of needle or code but run 'p' is ppl"),
        (dict(runs=["n"]), 'each of the "runs" must be an object'),
        (dict(runs=[*RUNS, {"name": "last", "kind": "needle"}]), "run 'last' must have a list as 'lengths'"),
        (dict(runs=[*RUNS, {"name": "last", "kind": "retrieval", "top_k": 9}]), "'top_k' has a wrong value: 9"),
        (dict(runs=[*RUNS, {**NEEDLE, "name": "last", "policies": ["best"]}]), "but got 'best'"),
        (dict(runs=[*RUNS, {**NEEDLE, "name": "last", "config": {"top_k": 3}}]), "'top_k' must be at least"),
        (dict(runs=[{**NEEDLE, "policies": 5}]), "'policies' has a wrong value: 5"),
        (dict(runs=[{**NEEDLE, "policies": [["dense"]]}]), "'policies' has a wrong value"),
        (dict(runs=[{**NEEDLE, "config": 5}]), "'config' has a wrong value: 5"),
        (dict(runs=[{**NEEDLE, "lengths": ["a"]}]), r"'lengths' has a wrong value: \['a'\]"),
        (dict(runs=[{**NEEDLE, "depths": "0.5"}]), "'depths' has a wrong value"),
        (dict(runs=[{**NEEDLE, "seed": "1"}]), "'seed' has a wrong value"),
        (dict(runs=[{**NEEDLE, "limit": True}]), "'limit' has a wrong value"),
        (dict(runs=[{**NEEDLE, "quick": ["limit"]}]), "'quick' has a wrong value"),
        (dict(runs=[{"name": "m", "kind": "memory"}], tables=[table(("m", "dense"))]), "memory has no cell"),
    ],
)
def test_what_is_wrong_shows_before_any_work(make, suite, message):
    with pytest.raises(ValueError, match=message):
        make(**suite)
    assert not make.begun and not make.out.exists()


def test_a_missing_matplotlib_shows_before_any_work(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        make()
    assert not make.begun
