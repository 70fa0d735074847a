"""The suites of the real models: they run, on a small model of the family, and say what they must."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner
from family_models import family_model
from local_models import write_indexers, write_model
from mlx.utils import tree_flatten

from mlx_dsa.cli import main
from mlx_dsa.evals import read_result, read_suite
from mlx_dsa.evals.tables import overview, table

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"real": "qwen2", "real-small": "llama"}


def write_family(folder, family):
    """Write a small random model of a family, with the bundled tokenizer and with indexers."""
    write_model(folder / "model")
    config = dict(vocab_size=4096, max_position_embeddings=32768)
    model = family_model(family, **config)
    config = {k: v for k, v in vars(model.args).items() if v is not None}
    (folder / "model" / "config.json").write_text(json.dumps({**config, "eos_token_id": [2, 0]}))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(
        str(folder / "model" / "model.safetensors"), weights, metadata={"format": "mlx"}
    )
    write_indexers(folder / "indexers", retention_dim=8)


@pytest.fixture(scope="module", params=MODELS)
def made(request, tmp_path_factory):
    """Return a suite and the folder in which its quick runs are."""
    folder = tmp_path_factory.mktemp(request.param)
    write_family(folder, MODELS[request.param])
    file = ROOT / "eval" / f"{request.param}.json"
    out = folder / "out"
    options = ["--model", folder / "model", "--indexer", folder / "indexers", "--out", out]
    done = CliRunner().invoke(main, ["eval", "suite", *map(str, (file, "--quick", *options))])
    assert done.exit_code == 0, done.output
    return read_suite(file), out


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


def test_what_the_tables_show_is_run(made):
    """With the results of the quick runs under the labels of the whole ones."""
    suite, out = made
    results, labels = {}, {}
    for run in suite["runs"]:
        results[run["name"]] = read_result(out / f"{run['name']}.json")
        for spec in run.get("policies", ()):
            own = {} if spec == "dense" else spec
            label = own.get("label") or (f"{own['policy']}@{own['top_k']}" if own else "dense")
            labels.setdefault(run["name"], set()).add(label)
        if run["kind"] == "retrieval":
            labels[run["name"]] = set(run["top_k"])
    for shown in suite["tables"]:
        for cells in shown["rows"].values():
            for run, label in cells:
                assert label in labels[run]


def test_every_cell_has_a_hundred_cases_and_the_policies_one_budget():
    for run in read_suite(ROOT / "eval" / "real.json")["runs"]:
        if run["kind"] in ("needle", "code"):
            n = len(run["depths"]) * run["limit"] * run.get("per_document", 4)
            assert n >= 100 and run["policies"][0] == "dense"
            assert max(run["lengths"]) + 256 <= 32768 or max(run["lengths"]) <= 16384
