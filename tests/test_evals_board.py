"""Policies that are rules' names, the time of each, and the leaderboard over all rules."""

import functools
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from builders import rules_alone
from calibrations import calibrations_for
from click.testing import CliRunner
from evals_subject import make_subject

from mlx_dsa import SparseConfig
from mlx_dsa.cli import main
from mlx_dsa.evals import evaluator as evaluator_module
from mlx_dsa.evals import leaderboard, make_policies, make_policy, read_suite, retrieval, timing
from mlx_dsa.evals.each_rule import each_rule
from mlx_dsa.evals.evaluator import evaluator_of
from mlx_dsa.evals.generation import read
from mlx_dsa.evals.policies import policy_names
from mlx_dsa.evals.report.board import board, board_markdown, board_tables
from mlx_dsa.registry import forget
from mlx_dsa.rules import EvictRule, register, rule_names
from mlx_dsa.rules.minference import MInference

ROOT = Path(__file__).parent.parent
BASE = SparseConfig(top_k=64, n_recent=16, prefill="dense")
BUDGET = [{"top_k": 64, "n_recent": 16}]
# With room for the window that sparsek always reads.
BIG, BIG_BUDGET = SparseConfig(top_k=96, n_recent=16, prefill="dense"), [{"top_k": 96, "n_recent": 16}]


@pytest.fixture
def middle():
    """Register a rule that keeps positions 100 to 109, and one that fails."""

    @register("evict", "test-middle")
    @dataclass(frozen=True)
    class Middle(EvictRule):
        def worth(self, cache):
            return ((cache.positions >= 100) & (cache.positions < 110)).astype(mx.float32)

    @register("evict", "test-broken")
    @dataclass(frozen=True)
    class Broken(EvictRule):
        def worth(self, cache):
            raise KeyError("no such thing")

    yield
    forget("evict", "test-middle")
    forget("evict", "test-broken")


# Policies


def test_every_rule_is_a_policy():
    for name in rule_names("evict"):
        policy = make_policy(name, BIG)
        assert policy.label == f"{name}@96" and policy.config.evict == name
        assert policy.config.cache == "budget" and policy.config.prefill == "dense"
    for name in rule_names("select"):
        policy = make_policy("select:" + name, BIG)
        assert policy.label == f"select:{name}@96" and policy.config.select == name
        assert policy.config.cache == "full" and policy.config.prefill == "exact"
    assert len(set(policy_names())) == len(policy_names())


@pytest.mark.parametrize(
    "spec, label",
    [
        ({"policy": "sparse", "evict": "tova"}, "tova@64"),
        ({"policy": "sparse", "select": "window"}, "sparse, select:window@64"),
        ({"policy": "sparse", "select": "window", "evict": "knorm:pool=2"}, "knorm:pool=2, select:window@64"),
        ({"policy": "sparse", "evict": "tova", "label": "own"}, "own"),
        ("snapkv:pool=2", "snapkv:pool=2@64"),
        ("sparse", "sparse@64"),
    ],
)
def test_labels_name_the_rules(spec, label):
    assert make_policy(spec, BASE).label == label


@pytest.mark.parametrize(
    "spec, message",
    [
        ("tov", "'policy' must be one of dense, .*tova.*select:oracle.* but got 'tov'"),
        ("select:tova", "'policy' must be one of dense"),
        (["tova"], "must be|sequence"),
        ("knorm:size=1", "'evict' 'knorm' has no option 'size'"),
        ({"policy": "tova", "cache": "full"}, "'tova' is an order of eviction, but cache 'full'"),
        ({"policy": "tova", "evict": "knorm"}, "policy 'tova' is evict 'tova' by itself"),
        ({"policy": "select:oracle", "cache": "budget"}, "is cache 'full' by itself"),
    ],
)
def test_what_is_no_policy(spec, message):
    with pytest.raises(ValueError, match=message):
        make_policy(spec, BASE)


def test_a_rules_name_runs_the_rule(middle):
    subject, kept = make_subject(), {}
    for name in ("test-middle", "window"):
        with make_policy(name, BASE).apply(subject) as patch:
            caches = patch.make_cache()
            read(subject.model, mx.arange(200)[None], caches)
            kept[name] = set(np.array(caches[0].positions)[0].tolist())
    assert set(range(100, 110)) <= kept["test-middle"] and not set(range(100, 110)) & kept["window"]


def test_one_policy_for_each_rule():
    policies = {p.label: p.config for p in make_policies(["dense", "evict:*", "select:*"], BIG, BIG_BUDGET) if p.config}
    labels = [f"{n}@96" for n in rule_names("evict")] + [f"select:{n}@96" for n in rule_names("select")]
    assert list(policies) == labels
    # "index" reads what selects; the others pay for nothing that they don't read.
    assert policies["index@96"].select == "lightning" and policies["tova@96"].select == "window"
    own = make_policies([{"policy": "evict:*", "rules": ["tova"], "select": "oracle"}], BIG, BIG_BUDGET)
    assert [p.label for p in own] == ["tova@96"] and own[0].config.select == "oracle"
    with pytest.raises(ValueError, match="leave label out"):
        each_rule({"policy": "select:*", "label": "a"})


# Selections and time


def test_selections_of_rules_are_those_of_the_runtime():
    subject = make_subject()
    result = retrieval(subject, top_k=[32], length=200, queries=8, limit=2, select=["*"])
    masses = {r["policy"]: (r["value"], r["mass_value"]) for r in result["rows"] if r["layer"] is None}
    # Search projections are not what the subject has.
    there = [f"select:{n}" for n in rules_alone()]
    assert set(masses) == {"index", "random", "window", "attention", *there}
    assert masses["select:lightning"] == masses["index"] and masses["select:window"] == masses["window"]
    assert masses["index"] != masses["window"]
    assert masses["select:random"][1] < masses["select:oracle"][1] <= masses["attention"][1]
    assert {(p["policy"], p["against"]) for p in result["pairs"]} >= {("index", "select:oracle")}


def test_sets_of_each_head_are_measured():
    subject = make_subject()
    rules = ["quest:page=4", "quest:page=4,by_head=true"]
    result = retrieval(subject, top_k=[32], length=200, queries=8, limit=2, select=rules)
    masses = {r["policy"]: r["mass_value"] for r in result["rows"] if r["layer"] is None}
    shared, own = (masses[f"select:{rule}"] for rule in rules)
    assert shared != own and masses["window"] < own <= masses["attention"]


def test_a_rule_whose_queries_are_read_together_is_asked_for_all(monkeypatch):
    subject = make_subject()
    subject = subject._replace(indexers=calibrations_for(subject.model, "minference"))
    asked, select = set(), MInference.select

    def spy(self, probe, cache, top_k, n_visible, end, forced):
        asked.add((probe.queries.shape[2], len(n_visible), n_visible[-1].item(), end))
        return select(self, probe, cache, top_k, n_visible, end, forced)

    monkeypatch.setattr(MInference, "select", spy)
    result = retrieval(subject, top_k=[32], length=200, queries=8, limit=1, select=["minference:block=8"])
    masses = {r["policy"]: r["mass_value"] for r in result["rows"] if r["layer"] is None}
    assert 0.1 < masses["select:minference:block=8"] <= masses["attention"] and "index" not in masses
    assert asked == {(200, 200, 200, 200)}


def test_selections_without_indexers():
    subject = make_subject()
    bare = subject._replace(indexers=dict.fromkeys(subject.indexers))
    result = retrieval(bare, top_k=[32], length=100, queries=4, limit=1, select=["oracle"])
    assert {r["policy"] for r in result["rows"]} == {"random", "window", "attention", "select:oracle"}
    assert result["pairs"] == []
    with pytest.raises(ValueError, match="'lightning' reads indexers"):
        retrieval(bare, top_k=[32], length=100, queries=4, limit=1, select=["lightning"])


def test_time_and_the_bytes_of_an_entry():
    subject = make_subject(retention_dim=4, prefill="dense")
    policies = make_policies(["dense", "retention", {"policy": "keydiff", "select": "window"}], BASE)
    result = timing(subject, policies, length=150, steps=4, repeats=2)
    entry = 2 * 2 * 32 * 4  # keys and values, 2 heads of 32, float32
    index, score, position = 12 * 4, 8, 4
    found = {r["policy"]: r["entry_bytes"] for r in result["rows"]}
    assert found == {"dense": entry, "retention@64": entry + index + score + position, "keydiff@64": entry + position}
    assert all(0 < r["low"] <= r["value"] <= r["high"] and r["read_ms"] > 0 for r in result["rows"])
    with pytest.raises(ValueError, match="'steps' must be at least 1"):
        timing(subject, policies, length=150, steps=0)


# Boards

SPEC = {
    "name": "b", "title": "Rules", "accuracy": {"first": "n/first", "last": "n", "other": "m"},
    "ppl": "p", "timing": "t", "retrieval": "r",
}  # fmt: skip


def answers(policy, *pairs):
    return [{"policy": policy, "first_correct": a, "correct": b} for a, b in pairs]


def made_up():
    """Return results of runs `n` and `p`; those of `m`, `t` and `r` are not there."""
    items = answers("dense", (1, 1), (1, 1)) + answers("a@8", (1, 0), (1, 0)) + answers("b@8", (1, 1), (0, 1))
    items += answers("b@16", (1, 1), (1, 1))
    pairs = [
        {"policy": f"{n}@8", "against": "dense", "ratio": 1.5, "ratio_low": None, "ratio_high": None} for n in "ab"
    ]
    about = {
        "config": {"model": {"name": "x", "dtype": "float32"}},
        "versions": {"mlx": "1"},
        "device": {"device": "cpu"},
    }
    return {"n": {"items": items, **about}, "p": {"pairs": pairs, **about}}


def test_a_board_counts_right_answers():
    rows = {(r["rule"], r["top_k"]): r for r in board(SPEC, made_up())}
    assert rows["a", 8]["cells"] == {"first": (2, 2), "last": (0, 2)} and rows["a", 8]["mean"][0] == 0.5
    assert rows["b", 8]["cells"] == {"first": (1, 2), "last": (2, 2)} and rows["b", 8]["mean"][0] == 0.75
    assert rows["dense", None]["mean"][0] == 1 and "ppl" not in rows["b", 16]


def test_the_best_rule_stands_first_behind_dense():
    tables = board_tables(SPEC, board(SPEC, made_up()))
    header, lines = tables[8]
    assert header == ["rule", "mean [95%]", "first", "last", "perplexity over dense [95%]"]
    assert [line[0] for line in lines] == ["dense", "b", "a"]
    assert lines[2][2:] == ["100.0%", "0.0%", "1.500"]
    assert [line[0] for line in tables[16][1]] == ["dense", "b"] and tables[16][1][1][-1] == "-"
    text = board_markdown(SPEC, made_up())
    assert "### K = 8" in text and "Right answers of 2 in each column" in text


# The leaderboard

RUNS = [
    {"name": "n", "kind": "needle", "lengths": [256], "depths": [0.5], "limit": 1, "max_tokens": 2, "per_document": 2,
     "setting": "before-question", "turns": 2, "top_k": BUDGET, "policies": ["dense", "evict:*"]},
    {"name": "p", "kind": "ppl", "path": "decode", "length": 150, "decode_tokens": 4, "limit": 1, "top_k": BUDGET,
     "policies": [{"policy": "evict:*"}]},
    {"name": "t", "kind": "timing", "length": 100, "steps": 2, "repeats": 1, "top_k": BUDGET, "policies": ["evict:*"]},
    {"name": "r", "kind": "retrieval", "length": 100, "limit": 1, "queries": 4, "top_k": [32], "select": ["*"]},
]  # fmt: skip
SUITE = {
    "title": "All rules",
    "runs": RUNS,
    "boards": [{"name": "b", "title": "Rules", "accuracy": {"one": "n/first", "two": "n"}, "ppl": "p", "timing": "t",
                "retrieval": "r"}],
}  # fmt: skip


def write(tmp_path, **changes):
    file = tmp_path / "suite.json"
    file.write_text(json.dumps({**SUITE, **changes}))
    return file


def test_a_leaderboard_goes_on_past_what_fails(middle, tmp_path, monkeypatch):
    subject, folder = make_subject(retention_dim=4, n_recent=16, prefill="dense"), tmp_path / "out"
    suite, notes, fails = read_suite(write(tmp_path)), [], [True]
    rules = ["tova", "test-middle", "test-broken", "oracle"]

    known = evaluator_of("ppl")

    @functools.wraps(known.run)
    def ppl(*args, **options):
        if fails.pop():
            raise RuntimeError("out of memory")
        return known.run(*args, **options)

    monkeypatch.setitem(evaluator_module._EVALUATORS, "ppl", replace(known, run=ppl))
    results, failed = leaderboard(subject, suite, folder, rules=rules, note=notes.append)
    assert list(failed) == ["p"] and set(results) == {"n", "t", "r"}
    assert notes == [
        "Left out: evict test-broken: KeyError: 'no such thing'",
        "Failed: p: out of memory",
    ]
    text = (folder / "leaderboard.md").read_text()
    assert "perplexity" not in text and "Failed: p: out of memory" in text and "test-broken" in text
    assert not (folder / "report.md").exists()

    fails[:] = [False]
    before = (folder / "n.json").stat().st_mtime_ns
    results, failed = leaderboard(subject, suite, folder, rules=rules, note=notes.append)
    assert not failed and set(results) == {"n", "p", "t", "r"}
    assert (folder / "n.json").stat().st_mtime_ns == before  # not made again
    assert {r["policy"] for r in results["n"]["rows"]} == {"dense", "tova@64", "test-middle@64"}
    text = (folder / "leaderboard.md").read_text()
    assert "perplexity over dense" in text and "| oracle |" in text and "### K = 64" in text
    assert (folder / "report.md").exists() and (folder / "board-b.png").read_bytes()[:4] == b"\x89PNG"


def test_the_leaderboard_of_some_runs(tmp_path, monkeypatch, sparse_subject):
    file, out = write(tmp_path), tmp_path / "out"
    options = ["eval", "leaderboard", str(file), "--out", str(out), "--rules", "tova,window"]
    for run in ("t", "r"):
        done = CliRunner().invoke(main, [*options, "--run", run])
        assert done.exit_code == 0, done.output
    text = (out / "leaderboard.md").read_text()  # the second call shows what the first has made
    assert "| tova | " in text and "mass@K" in text and "knorm" not in text
    assert not (out / "n.json").exists() and not (out / "report.md").exists()


@pytest.fixture
def sparse_subject(monkeypatch):
    subject = make_subject(n_recent=16, prefill="dense")
    monkeypatch.setattr(sys.modules["mlx_dsa.cli.eval.leaderboard"], "load_settings", lambda settings: subject)


@pytest.mark.parametrize(
    "changes, options, message, code",
    [
        ({}, ["--rules", "tov"], "there is no rule 'tov': the rules are", 1),
        ({}, ["--run", "x"], "there is no run 'x'", 1),
        ({"boards": []}, [], "has no boards", 2),
        ({"boards": [{**SUITE["boards"][0], "ppl": "n"}]}, [], "wants a run of kind ppl but 'n' is needle", 1),
        ({"boards": [{"name": "b"}]}, [], "each board must have", 1),
        ({"boards": [{**SUITE["boards"][0], "accuracy": {"a": "x/first"}}]}, [], "'x' is none", 1),
    ],
)
def test_what_a_leaderboard_refuses(changes, options, message, code, tmp_path, sparse_subject):
    out = tmp_path / "out"
    file = write(tmp_path, **changes)
    done = CliRunner().invoke(main, ["eval", "leaderboard", str(file), "--out", str(out), *options])
    assert done.exit_code == code and message in " ".join(done.output.split()), done.output
    assert not out.exists()


@pytest.mark.parametrize("name, n, lengths", [("leaderboard", 200, 4096), ("leaderboard-real", 100, 8192)])
def test_the_leaderboards_in_the_repository(name, n, lengths):
    suite = read_suite(ROOT / "eval" / f"{name}.json")
    assert [b["name"] for b in suite["boards"]] == ["forget", "select"]
    for run in suite["runs"]:
        shares = {1 / 32, 1 / 16, 1 / 8}
        if run["kind"] == "needle":
            assert run["lengths"] == [lengths]
            assert len(run["depths"]) * run["limit"] * run["per_document"] >= n
        if "evict:*" in run.get("policies", ()):
            assert {k["top_k"] / lengths for k in run["top_k"]} == shares
            assert all(k["n_recent"] == k["top_k"] / 4 for k in run["top_k"])
        else:
            assert {k / lengths for k in run["top_k"]} == shares
