"""The suites of the real models: they run, on a small model of the family, and say what they must."""

import json
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner
from family_models import family_model
from local_models import write_indexers, write_model
from mlx.utils import tree_flatten

from mlx_dsa.cli import main
from mlx_dsa.evals import read_result, read_suite
from mlx_dsa.evals.report.tables import table
from mlx_dsa.presets import resolve

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"real": "qwen2", "real-small": "llama", "real-stream": "qwen2"}
# Exact selection takes long there.
LONG = ("exact-16k", "exact-32k")
ALONE = [("million", "qwen2", ("facts-1m", "ppl-1m-last-16k")), ("real-small", "llama", ("ppl-after-8k-of-64k",))]
LONGER = ("-4k", "-16k", "-32k", "-64k", "-100k")
cli_suite = sys.modules["mlx_dsa.cli.eval.suite"]  # the package has a command of that name


def write_family(folder, family):
    """Write a small random model of a family, with the bundled tokenizer and with indexers."""
    write_model(folder / "model")
    config = dict(vocab_size=4096, max_position_embeddings=32768, rope_scaling=None)
    model = family_model(family, **config)
    config = {k: v for k, v in vars(model.args).items() if v is not None}
    (folder / "model" / "config.json").write_text(json.dumps({**config, "eos_token_id": [2, 0]}))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model" / "model.safetensors"), weights, metadata={"format": "mlx"})
    write_indexers(folder / "indexers", retention_dim=8)


@pytest.fixture(scope="module", params=MODELS)
def made(request, tmp_path_factory):
    """Return a suite and the folder in which its quick runs are: of each kind, the shortest length."""
    folder = tmp_path_factory.mktemp(request.param)
    write_family(folder, MODELS[request.param])
    suite = read_suite(ROOT / "eval" / f"{request.param}.json")
    runs = [r for r in suite["runs"] if not any(n in r["name"] for n in LONGER)]
    suite = {k: v for k, v in suite.items() if k not in ("tables", "pictures")} | {"runs": runs}
    file = folder / "suite.json"
    file.write_text(json.dumps(suite))
    options = ["--model", folder / "model", "--indexer", folder / "indexers", "--out", folder / "out"]
    done = CliRunner().invoke(main, ["eval", "suite", *map(str, (file, "--quick", *options))])
    assert done.exit_code == 0, done.output
    return suite, folder / "out"


def test_each_run_is_made_and_reported(made):
    suite, out = made
    report = (out / "report.md").read_text()
    for run in suite["runs"]:
        assert f"## {run['title']}" in report
        result = read_result(out / f"{run['name']}.json")
        assert result["rows"] and (out / f"{run['name']}.png").exists()
        if run["kind"] in ("needle", "code"):
            assert "of dense [95%]" in table(result)[0]
            assert all(row["n"] for row in result["rows"])


@pytest.mark.parametrize("name, family, runs", ALONE)
def test_runs_beyond_the_models_positions_are_quick_on_the_bundled_books(name, family, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no all.txt
    write_family(tmp_path, family)
    options = [ROOT / "eval" / f"{name}.json", "--model", "model", "--indexer", "indexers", "--out", "out"]
    options += [o for run in runs for o in ("--run", run)]
    done = CliRunner().invoke(main, ["eval", "suite", "--quick", *map(str, options)])
    assert done.exit_code == 0, done.output
    for run in runs:
        result = read_result(tmp_path / "out" / f"{run}.json")
        assert all(row["n"] for row in result["rows"]) and "dense" not in {r["policy"] for r in result["rows"]}
        assert result["config"].get("data", result["config"].get("haystack")) == "bundled books"
    if name == "million":
        whole = CliRunner().invoke(main, ["eval", "suite", *map(str, options[:-2])])
        assert whole.exit_code == 1 and "'all.txt' is not there" in whole.output


@pytest.mark.parametrize("name", [*MODELS, "million"])
def test_what_the_tables_show_is_run(name):
    suite, labels = read_suite(ROOT / "eval" / f"{name}.json"), {}
    for run in suite["runs"]:
        labels[run["name"]] = set(run["top_k"]) if run["kind"] == "retrieval" else set()
        for spec in run.get("policies", ()):
            own = {} if spec == "dense" else spec
            label = own.get("label") or (f"{own['policy']}@{own['top_k']}" if own else "dense")
            labels[run["name"]].add(label)
    assert suite["tables"]
    for shown in suite["tables"]:
        for cells in shown["rows"].values():
            assert all(label in labels[run] for run, label in cells)


def test_a_copy_of_the_model_in_ones_own_folder_has_the_suites_indexers(tmp_path, monkeypatch):
    write_family(tmp_path, "qwen2")
    asked = []
    monkeypatch.setattr(cli_suite, "load_settings", lambda settings: asked.append(settings) or 1 / 0)
    file = ROOT / "eval" / "real.json"
    for options in ([], ["--indexer", str(tmp_path / "indexers")]):
        model = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
        CliRunner().invoke(main, ["eval", "suite", str(file), *model, *options])
    own, given = asked
    assert own.model == given.model == str(tmp_path / "model")
    assert own == resolve("qwen2.5-coder-0.5b", model=own.model)
    assert given.indexer == str(tmp_path / "indexers")


def test_every_cell_has_two_hundred_cases_and_the_policies_one_budget():
    for run in read_suite(ROOT / "eval" / "real.json")["runs"]:
        if run["kind"] in ("needle", "code"):
            n = len(run["depths"]) * run["limit"] * run.get("per_document", 4)
            assert n == (100 if run["name"] in LONG else 200) and run["policies"][0] == "dense"
            assert max(run["lengths"]) + 256 <= 32768 or max(run["lengths"]) <= 16384


def test_titles_say_whether_replies_are_begun():
    suite = read_suite(ROOT / "eval" / "real.json")
    begun = {run["name"]: "stem" in run for run in suite["runs"] if run["kind"] in ("needle", "code")}
    own = {name for name, with_stem in begun.items() if not with_stem}
    assert own == {"own-words-8k", "own-words-16k", "own-words-32k"}
    for run in suite["runs"]:
        assert run["title"].endswith(", replies begun") == begun.get(run["name"], False)
    shown = [(p["title"], p["runs"]) for p in suite["pictures"]]
    for table_of in suite["tables"]:
        shown.append((table_of["title"], {run for cells in table_of["rows"].values() for run, _ in cells}))
    for title, runs in shown:
        # Never both in one table.
        assert {begun.get(run, False) for run in runs} == {"replies begun" in title}
        assert ("own words" in title) == (not own.isdisjoint(runs))
