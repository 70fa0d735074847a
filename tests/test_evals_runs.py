"""Runs: killed and resumed, shared out over processes, compared; and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from local_models import write_indexers, write_model

from mlx_dsa import SparseConfig, blas
from mlx_dsa.cli import main
from mlx_dsa.evals import compare, make_policies, plot, read_result, read_suite
from mlx_dsa.evals.running.results import Journal
from mlx_dsa.evals.running.runner import Unit, journal_path, run_units
from mlx_dsa.presets import resolve

ROOT = Path(__file__).resolve().parents[1]
TIMES = ("read_s", "peak_gb")
NEEDLE = [
    "needle",
    "--lengths",
    "192,256",
    "--depths",
    "2",
    "--limit",
    "3",
    "--max-tokens",
    "3",
    "--policies",
    "dense,sparse,random",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("subject")
    write_model(folder / "model")
    write_indexers(folder / "indexers")
    settings = {"model": "model", "indexer": "indexers", "top_k": 64, "n_recent": 16}
    settings["evict"] = "index"  # the indexers have no retention heads
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder / "settings.json"


def _command(model, *arguments):
    return [sys.executable, "-m", "mlx_dsa", "eval", *arguments, "--config", str(model)]


def _environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}


def _run(model, *arguments):
    return CliRunner().invoke(main, ["eval", *map(str, arguments), "--config", str(model)])


def _timeless(path):
    """Return a result without what a clock or the allocator said."""
    result = read_result(path)
    for entry in (*result["rows"], *result["items"]):
        for name in TIMES:
            entry.pop(name, None)
    return {k: result[k] for k in ("kind", "config", "rows", "pairs", "items")}


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "needle.json"
    done = _run(model, *NEEDLE, "--out", out)
    assert done.exit_code == 0, done.output
    return out


def test_a_result_says_what_it_is(whole):
    result = read_result(whole)
    assert result["versions"]["mlx-dsa"] and result["device"]["cpus"]
    assert {"n", "value", "low", "high"} <= result["rows"][0].keys()
    assert len(result["items"]) == 3 * 12 and len(result["pairs"]) == 4
    assert not journal_path(whole).exists()


def test_a_killed_run_goes_on_to_the_same_report(model, whole, tmp_path):
    out = tmp_path / "needle.json"
    journal = journal_path(out)
    process = subprocess.Popen(
        _command(model, *NEEDLE, "--out", str(out)),
        env=_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 5):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    before = journal.read_bytes()
    # A kill can also fall into the middle of a line.
    journal.write_bytes(before + before.splitlines()[-1][:40])
    done = _run(model, *NEEDLE, "--out", out)
    assert done.exit_code == 0, done.output
    assert _timeless(out) == _timeless(whole)


def test_two_processes_make_the_same_report(model, whole, tmp_path):
    out = tmp_path / "needle.json"
    hosts = tmp_path / "hosts.json"
    port = 20_000 + os.getpid() % 20_000
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"], [f"127.0.0.1:{port + 1}"]]))
    command = _command(model, *NEEDLE, "--out", str(out))
    processes = [
        subprocess.Popen(
            command,
            env={**_environment(), "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [p.communicate(timeout=240) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], outputs
    assert read_result(out)["device"]["processes"] == 2
    assert _timeless(out) == _timeless(whole)
    assert outputs[1][0] == ""
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_finished_run_is_not_made_again_and_another_is_refused(model, whole):
    stamp = whole.stat().st_mtime_ns
    assert _run(model, *NEEDLE, "--out", whole).exit_code == 0
    refused = _run(model, *NEEDLE, "--seed", "1", "--out", whole)
    assert refused.exit_code == 1
    assert "holds another run" in refused.output
    assert whole.stat().st_mtime_ns == stamp


def test_the_journal_of_another_run_is_refused(tmp_path):
    Journal(tmp_path / "a.jsonl", {"seed": 0})
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        Journal(tmp_path / "a.jsonl", {"seed": 1})


def test_progress_counts_what_was_done_before(tmp_path):
    units = [Unit(str(i), i) for i in range(4)]
    told = []
    for stop in (2, None):

        def work(i, stop=stop):
            if i == stop:
                raise KeyboardInterrupt
            return [{"i": i}]

        options = dict(config={}, out=tmp_path / "a.json", progress=lambda *a: told.append(a[:2]))
        if stop is not None:
            with pytest.raises(KeyboardInterrupt):
                run_units(units, work, **options)
        else:
            records, seconds = run_units(units, work, **options)
            assert records == [{"i": i} for i in range(4)] and seconds > 0
    assert told == [(0, 4), (1, 4), (2, 4), (2, 4), (3, 4), (4, 4)]


def test_compare_pairs_the_same_items_only(model, whole, tmp_path):
    result = read_result(whole)
    pairs = compare(result, result)
    assert [p["difference"] for p in pairs] == [0.0] * 3
    other = tmp_path / "other.json"
    assert _run(model, *NEEDLE, "--seed", "1", "--out", other).exit_code == 0
    refused = CliRunner().invoke(main, ["eval", "compare", str(whole), str(other)])
    assert refused.exit_code == 1
    assert "different items" in refused.output and "Traceback" not in refused.output
    fewer = {**result, "items": result["items"][1:]}
    with pytest.raises(ValueError, match="stand in one of them only"):
        compare(result, fewer)


@pytest.mark.parametrize("kind", ["needle", "ppl", "gsm8k", "retrieval", "memory"])
def test_every_kind_is_a_command_with_a_table_and_a_picture(model, tmp_path, kind):
    options = {
        "needle": ["--lengths", "192", "--limit", "1", "--depths", "2"],
        "ppl": ["--lengths", "200", "--top-k", "64,100"],
        "gsm8k": ["--limit", "2", "--max-tokens", "3"],
        "retrieval": ["--lengths", "200", "--top-k", "32,64"],
        "memory": ["--lengths", "100,300"],
    }[kind]
    picture = tmp_path / "picture.png"
    done = _run(model, kind, "--quick", *options, "--plot", picture)
    assert done.exit_code == 0, done.output
    assert "sparse" in done.output or "index" in done.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_needle_command_asks_in_turns(model, tmp_path):
    out = tmp_path / "turns.json"
    options = ["--lengths", "256", "--setting", "before-question", "--turns", "2"]
    done = _run(model, "needle", "--quick", *options, "--out", out)
    assert done.exit_code == 0, done.output
    result = read_result(out)
    assert result["config"]["turns"] == 2
    assert all(0 <= row["first_turn"] <= 1 for row in result["rows"])


def test_the_code_command_asks(model, tmp_path):
    out = tmp_path / "code.json"
    options = ["--lengths", "1024", "--max-tokens", "3", "--batch", "2"]
    done = _run(model, "code", "--quick", *options, "--out", out, "--plot", tmp_path / "code.png")
    assert done.exit_code == 0, done.output
    result = read_result(out)
    assert result["kind"] == "code" and "of dense" in done.output
    for policy in ("dense", result["rows"][-1]["policy"]):
        whole, *at_depths = (row["n"] for row in result["rows"] if row["policy"] == policy)
        assert whole == 8 == sum(at_depths)
    assert (tmp_path / "code.png").exists()
    assert compare(result, result)[0]["difference"] == 0


SUITE = {
    "name": "small",
    "runs": [
        {"name": "n", "kind": "needle", "lengths": [192], "depths": [0.5], "limit": 2, "max_tokens": 3, "top_k": [64],
         "policies": ["dense", "full", {"policy": "kept", "label": "oracle"}], "quick": {"limit": 1}},
        {"name": "p", "kind": "ppl", "length": 200, "limit": 2, "config": {"prefill": "exact"}},
        {"name": "r", "kind": "retrieval", "length": 200, "limit": 1, "top_k": [32]},
    ],
}  # fmt: skip


def test_a_suite_makes_a_report_and_goes_on_where_it_was(model, tmp_path):
    file = tmp_path / "small.json"
    file.write_text(json.dumps(SUITE))
    done = _run(model, "suite", file, "--quick")
    assert done.exit_code == 0, done.output
    folder = tmp_path / "results" / "small-quick"
    report = (folder / "report.md").read_text()
    assert "oracle" in report and "![n](n.png)" in report and "--quick" in report
    assert sorted(p.name for p in folder.iterdir()) == [
        "n.json",
        "n.png",
        "p.json",
        "p.png",
        "r.json",
        "r.png",
        "report.md",
    ]
    (folder / "p.json").unlink()
    stamp = (folder / "n.json").stat().st_mtime_ns
    assert _run(model, "suite", file, "--quick").exit_code == 0
    assert (folder / "n.json").stat().st_mtime_ns == stamp
    assert (folder / "report.md").read_text().count("|") == report.count("|")


def test_processes_that_know_nothing_of_each_other_share_a_suite(model, tmp_path):
    file = tmp_path / "small.json"
    runs = [{**run, "name": run["name"] + "1"} for run in SUITE["runs"][:2]]
    picture = {"name": "both", "title": "Both", "runs": ["n1"]}
    file.write_text(json.dumps({**SUITE, "runs": runs, "pictures": [picture]}))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert _run(model, "suite", file, "--out", whole).exit_code == 0
    for share in ("2/3", "1/3", "2/3"):
        done = _run(model, "suite", file, "--run", "n1", "--share", share, "--out", parts)
        assert done.exit_code == 0, done.output
    # The third process never came: what it leaves is made by the run that joins.
    assert [p.name for p in sorted(parts.iterdir())] == ["n1.json.1.jsonl", "n1.json.jsonl"]
    held = [p.read_text().count("\n") - 1 for p in sorted(parts.iterdir())]
    assert sum(held) == 4 and min(held) >= 1  # of 3 policies on 2 texts
    assert _run(model, "suite", file, "--run", "n1", "--out", parts).exit_code == 0
    assert [p.name for p in sorted(parts.iterdir())] == ["n1.json", "n1.png"]
    assert _run(model, "suite", file, "--out", parts).exit_code == 0
    assert (parts / "report.md").exists() and (parts / "both.png").exists()
    for name in ("n1.json", "p1.json"):
        assert _timeless(parts / name) == _timeless(whole / name)


@pytest.mark.parametrize(
    "arguments, message, code",
    [
        (["--run", "m"], "no run 'm': the runs are n, p, r", 1),
        (["--share", "3/2"], "'3/2' is not a part", 2),
        (["--share", "0/2"], "'0/2' is not a part", 2),
        (["--share", "half"], "'half' is not a part", 2),
    ],
)
def test_parts_that_are_not_there(model, tmp_path, arguments, message, code):
    file = tmp_path / "small.json"
    file.write_text(json.dumps(SUITE))
    done = _run(model, "suite", file, *arguments)
    assert done.exit_code == code and message in done.output
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"runs": []}, 'a list of "runs"'),
        ({"pictures": [{"name": "a", "runs": ["q"]}]}, "no run 'q'"),
        ({"tables": [{"title": "a", "columns": ["b"], "rows": {"c": [["q", "dense"]]}}]}, "no run 'q'"),
        ({"tables": [{"title": "a", "columns": [], "rows": {"c": [["n", "dense"]]}}]}, "a cell for each"),
        ({"runs": [{"name": "a", "kind": "needles"}]}, "'kind' must be one of needle"),
        ({"runs": [{"kind": "needle"}]}, "needs a name of its own"),
        ({"runs": [{"name": "a", "kind": "ppl", "lengths": [1]}]}, "unknown key 'lengths'"),
    ],
)
def test_bad_suites(model, tmp_path, change, message):
    file = tmp_path / "bad.json"
    file.write_text(json.dumps({**SUITE, **change}))
    done = _run(model, "suite", file)
    assert done.exit_code == 1
    assert message in done.output and len(done.output.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, message, code",
    [
        (["needle", "--lengths", "9000"], "8,192 positions: it would answer wrongly. Lower --lengths", 1),
        (["needle", "--lengths", "8150"], "Lower --lengths or --max-tokens.", 1),
        (["code", "--lengths", "9000"], "8,192 positions: it would answer wrongly. Lower --lengths", 1),
        (["code", "--lengths", "120"], "no 120 tokens of the source", 1),
        (["ppl", "--path", "decode", "--lengths", "8000"], "Lower --lengths or --decode-tokens.", 1),
        (["memory", "--lengths", "8190"], "8,198 tokens are more than the model's 8,192", 1),
        (["retrieval", "--lengths", "8193"], "8,193 tokens are more than the model's 8,192", 1),
        (["gsm8k", "--limit", "1", "--max-tokens", "8192"], "--many-shot or --max-tokens.", 1),
        (["needle", "--lengths", "2k"], "is not a list of whole numbers", 2),
        (["needle", "--policies", "dense,best"], "must be one of dense, sparse", 2),
        (["needle", "--top-k", "5"], "--top-k must be at least", 1),
        (["needle", "--turns", "2"], "--turns needs setting 'before-question'", 1),
        (["needle", "--haystack", "no.txt"], "'no.txt' is not there", 1),
        (["needle", "--haystack", "{empty}"], "holds no text", 1),
        (["ppl", "--data", "{bad}"], "line 2 is not JSON", 1),
        (["ppl", "--lengths", "64"], "no smaller than the context", 1),
        (["ppl", "--lengths", "256", "--stride", "300"], "--stride must be between 1 and", 1),
        (["gsm8k", "--data", "no.jsonl"], "'no.jsonl' is not there", 1),
        (["retrieval", "--lengths", "200", "--top-k", "400"], "sees K = 400 keys", 1),
        (["compare", "a.json", "b.json"], "'a.json' is not there", 1),
    ],
)
def test_bad_input_is_one_line(model, tmp_path, arguments, message, code):
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    places = {"empty": tmp_path / "empty.txt", "bad": tmp_path / "bad.jsonl"}
    arguments = [a.format(**places) for a in arguments]
    extra = [] if arguments[0] == "compare" else ["--config", str(model)]
    done = CliRunner().invoke(main, ["eval", *arguments, *extra])
    assert done.exit_code == code, done.output
    line = " ".join(done.output.split())
    assert message in line and "Traceback" not in line
    lines = [x for x in done.output.splitlines() if x and blas.HINT not in x]
    assert code == 2 or len(lines) == 1


def test_nothing_to_draw_is_said(whole, tmp_path):
    result = read_result(whole)
    with pytest.raises(ValueError, match="no sparse policy"):
        plot({**result, "kind": "ppl", "pairs": []}, tmp_path / "a.png")


@pytest.mark.parametrize("file", sorted((ROOT / "eval").glob("*.json")), ids=lambda f: f.stem)
def test_the_suites_in_the_repository_are_valid(file):
    suite = read_suite(file)
    config = resolve(suite["preset"], **suite.get("config", {})).config
    for run in suite["runs"]:
        for options in (run, {**run, **run.get("quick", {})}):
            base = SparseConfig.from_dict({**vars(config), **options.get("config", {})})
            if run["kind"] != "retrieval":
                assert make_policies(options["policies"], base, options.get("top_k", ()))
