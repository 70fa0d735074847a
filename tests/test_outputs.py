"""Where commands write to is checked before they work."""

import os
import sys

import pytest
from click.testing import CliRunner
from local_models import write_indexers, write_model

from mlx_dsa.cli import main
from mlx_dsa.cli.outputs import check_output


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    root = tmp_path_factory.mktemp("local")
    return ["--model", write_model(root / "model"), "--indexer", write_indexers(root / "i")]


@pytest.fixture
def untouched(monkeypatch):
    """Let no command load a model."""

    def loads(*arguments, **options):
        raise AssertionError("the work began")

    for name in ("eval.options", "eval.suite", "eval.leaderboard", "eval.coverage", "subject", "session"):
        monkeypatch.setattr(sys.modules[f"mlx_dsa.cli.{name}"], "load_settings", loads)
    monkeypatch.setattr(sys.modules["mlx_dsa.cli.train"], "load_model", loads)


@pytest.fixture
def suite(tmp_path):
    file = tmp_path / "suite.json"
    file.write_text('{"runs": [{"name": "a", "kind": "memory"}]}')
    return file


WRITERS = {
    "bench --out": ["bench", "--out"],
    "bench --plot": ["bench", "--plot"],
    "needle --out": ["eval", "needle", "--out"],
    "needle --plot": ["eval", "needle", "--plot"],
    "memory --out": ["eval", "memory", "--out"],
    "ppl --out": ["eval", "ppl", "--out"],
    "gsm8k --out": ["eval", "gsm8k", "--out"],
    "retrieval --out": ["eval", "retrieval", "--out"],
    "suite --out": ["eval", "suite", "SUITE", "--out"],
    "leaderboard --out": ["eval", "leaderboard", "--out"],
    "coverage --out": ["eval", "coverage", "--out"],
    "compress --out": ["compress", "SUITE", "--out"],
    "compress --report": ["compress", "SUITE", "--out", "a.kv", "--report"],
    "train --out": ["train", "--data", "x.txt", "--out"],
}


def run(writer, suite, path, sparse):
    options = [suite if word == "SUITE" else word for word in WRITERS[writer]]
    model = sparse[:2] if options[0] == "train" else sparse
    return CliRunner().invoke(main, [str(word) for word in (*options, path, *model)])


@pytest.mark.parametrize("writer", WRITERS)
def test_a_place_that_takes_no_files_is_noticed_before_the_work(writer, suite, sparse, untouched, tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "new" / "result"
    result = run(writer, suite, path, sparse)
    errors = [line for line in result.output.splitlines() if line.startswith("Error")]
    assert result.exit_code == 1 and len(errors) == 1, result.output
    assert str(path) in errors[0]
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("writer", WRITERS)
def test_a_place_that_takes_files_is_worked_for(writer, suite, sparse, untouched, tmp_path):
    result = run(writer, suite, tmp_path / "new" / "result", sparse)
    assert str(result.exception) == "the work began", result.output


def test_what_tune_measures_must_have_a_place(untouched, sparse, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_DSA_CACHE", str(tmp_path / "file"))
    result = CliRunner().invoke(main, ["tune", *map(str, sparse)])
    assert result.exit_code == 1 and str(tmp_path / "file") in result.output
    monkeypatch.setenv("MLX_DSA_CACHE", str(tmp_path))
    result = CliRunner().invoke(main, ["tune", *map(str, sparse)])
    assert str(result.exception) == "the work began"


def test_files_and_folders_are_told_apart(tmp_path):
    (tmp_path / "file").write_text("kept")
    check_output(tmp_path / "file")
    check_output(tmp_path, folder=True)
    with pytest.raises(ValueError, match="is a folder"):
        check_output(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        check_output(tmp_path / "file", folder=True)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_a_file_system_that_takes_no_files():
    with pytest.raises(ValueError, match="can't be written") as caught:
        check_output("/proc/none/x.json")
    assert "/proc" in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="can't be written"):
        check_output(tmp_path / "x.json")
