"""The seam of evaluators: one from outside the package, in suites, on the command line, drawn."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from evals_subject import make_subject
from local_models import write_indexers, write_model

from mlx_dsa import plugins
from mlx_dsa.cli import main
from mlx_dsa.evals import compare, make_policies, read_suite, run_suite
from mlx_dsa.evals.evaluator import Evaluator, evaluator_kinds, evaluator_of, forget, register, takes
from mlx_dsa.evals.report.plots import plot
from mlx_dsa.evals.report.tables import caption, pairs_table, table
from mlx_dsa.tasks.options import option

DOCS = Path(__file__).resolve().parent.parent / "docs" / "evaluation.md"


@pytest.fixture
def surprise():
    """Register the evaluator that docs/evaluation.md shows."""
    code = re.search(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S).group(1)
    exec(code, {"__name__": "outside"})
    yield "surprise"
    forget("surprise")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("local")
    return str(write_model(root / "model")), str(write_indexers(root / "indexer"))


def test_it_runs_resumes_and_is_shown(surprise, tmp_path):
    subject = make_subject()
    policies = make_policies(["dense", "full"], subject.config, [64])
    out, evaluator = tmp_path / "it.json", evaluator_of(surprise)
    result = evaluator.run(subject, policies, length=100, out=out)
    assert json.loads(out.read_text()) == result == evaluator.run(subject, policies, length=100, out=out)
    assert table(result)[1] == [[r["policy"], f"{r['value']:.3f}"] for r in result["rows"]]
    assert result["rows"][0]["value"] != result["rows"][1]["value"]
    assert caption(result) is None and pairs_table(result) is None
    plot(result, tmp_path / "it.png")
    assert (tmp_path / "it.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="have no items to pair"):
        compare(result, result)


def test_a_suite_knows_it(surprise, tmp_path):
    file = tmp_path / "suite.json"
    run = {"name": "it", "kind": surprise, "length": 90, "policies": ["dense", "full"], "top_k": [64]}
    file.write_text(json.dumps({"runs": [run]}))
    results = run_suite(make_subject(), read_suite(file), tmp_path / "out")
    assert [r["policy"] for r in results["it"]["rows"]] == ["dense", "full@64"]
    assert "| dense |" in (tmp_path / "out" / "report.md").read_text()
    file.write_text(json.dumps({"runs": [{**run, "width": 3}]}))
    with pytest.raises(ValueError, match="unknown key 'width'.*length, seed"):
        read_suite(file)
    file.write_text(json.dumps({"runs": [{**run, "length": "x"}]}))
    with pytest.raises(ValueError, match="'length' has a wrong value"):
        read_suite(file)


def test_the_command_line_knows_it(surprise, folders, tmp_path):
    helped = CliRunner().invoke(main, ["eval", "surprise", "--help"]).output
    assert "--length" in helped and "The loss of random tokens" in helped and "--seed" in helped
    assert surprise in CliRunner().invoke(main, ["eval", "--help"]).output
    out = tmp_path / "it.json"
    given = ["--model", folders[0], "--indexer", folders[1], "--top-k", "40", "--n-recent", "8", "--out", str(out)]
    run = CliRunner().invoke(main, ["eval", "surprise", "--length", "90", "--policies", "dense,full", *given])
    assert run.exit_code == 0, run.output
    assert json.loads(out.read_text())["config"]["length"] == 90 and "full@40" in run.output
    run = CliRunner().invoke(main, ["eval", "surprise", "--batch", "2", *given])
    assert run.exit_code == 2 and "surprise has no --batch: leave it out" in run.output


@dataclass(frozen=True, kw_only=True)
class Said:
    lengths: list[int] = option(help="Tokens.", usual=(64, 128), quick=(8,), metavar="N,...")
    colour: str = option("red", "Of the walls.", choices=("red", "green"))
    limit: int = option(4, "Texts.", least=1, quick=1)
    depths: tuple = option((0.0, 0.5, 1.0), "Places.", counted=True)
    hidden: int = 7
    seed: int = 0


def test_what_a_dataclass_says_is_what_all_know(folders, tmp_path):
    seen = []

    @takes(Said)
    def walls(subject, policies, options, *, name=None, out=None, world=None, progress=None):
        """Count walls."""
        seen.append(options)

    known = evaluator_of("ppl")
    register(Evaluator("walls", walls, known.table, known.plot))
    walls(None, [], lengths=[3])
    assert seen.pop() == Said(lengths=[3])
    with pytest.raises(TypeError, match="unexpected keyword argument 'width'"):
        walls(None, [], lengths=[3], width=2)
    assert list(evaluator_of("walls").options) == ["lengths", "colour", "limit", "depths", "hidden", "seed"]
    file = tmp_path / "suite.json"
    run = {"name": "it", "kind": "walls", "lengths": [3]}
    for wrong, told in ({"colour": 3}, "'colour' has a wrong value"), ({"width": 3}, "unknown key 'width'"):
        file.write_text(json.dumps({"runs": [{**run, **wrong}]}))
        with pytest.raises(ValueError, match=told):
            read_suite(file)
    helped = " ".join(CliRunner().invoke(main, ["eval", "walls", "--help"]).output.split())
    assert "Count walls." in helped and "--hidden" not in helped
    assert "--lengths N,... Tokens. [default: 64,128]" in helped and "Of the walls. [default: red]" in helped
    given = ["eval", "walls", "--model", folders[0], "--indexer", folders[1], "--top-k", "40", "--n-recent", "8"]
    for more, wanted in (
        ([], Said(lengths=(64, 128))),
        (["--quick"], Said(lengths=(8,), limit=1)),
        (["--quick", "--limit", "3", "--lengths", "5,6"], Said(lengths=[5, 6], limit=3)),
        (["--colour", "green", "--depths", "2"], Said(lengths=(64, 128), colour="green", depths=[0.0, 1.0])),
    ):
        done = CliRunner().invoke(main, [*given, *more])
        assert done.exit_code == 0 and seen.pop() == wanted, done.output
    assert CliRunner().invoke(main, [*given, "--colour", "blue"]).exit_code == 2
    forget("walls")


def test_an_installed_package_may_bring_one(monkeypatch):
    known = evaluator_of("ppl")

    class Plugin:
        value = "outside.evaluators"

        def load(self):
            register(replace(known, kind="brought"))

    monkeypatch.setattr(plugins, "entry_points", lambda group: [Plugin()] if group == "mlx_dsa.evaluators" else [])
    assert "brought" not in evaluator_kinds()  # they are asked for once
    plugins.load_plugins.cache_clear()
    assert "brought" in evaluator_kinds() and evaluator_of("brought").kind == "brought"
    forget("brought")
    plugins.load_plugins.cache_clear()


def test_once_forgotten_it_is_unknown(tmp_path):
    assert "surprise" not in evaluator_kinds()
    run = CliRunner().invoke(main, ["eval", "surprise"])
    assert run.exit_code == 2 and "No such command" in run.output
    with pytest.raises(ValueError, match="'kind' must be one of .*needle.* but got 'surprise'"):
        evaluator_of("surprise")


def test_two_of_one_kind_are_refused():
    known = evaluator_of("ppl")
    assert register(known) is known
    with pytest.raises(ValueError, match="there is an evaluator 'ppl' already"):
        register(Evaluator("ppl", known.run, known.table, known.plot))


def test_times_run_from_the_command_line(folders):
    run = CliRunner().invoke(
        main,
        ["eval", "timing", "--model", folders[0], "--indexer", folders[1], "--top-k", "40", "--n-recent", "8",
         "--length", "60", "--steps", "2", "--repeats", "1", "--policies", "dense,sparse"],
    )  # fmt: skip
    assert run.exit_code == 0 and "ms a step" in run.output, run.output
