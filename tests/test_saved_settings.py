"""A saved cache brings its settings to the chat that goes on from it."""

import json
import re

import pytest
from click.testing import CliRunner
from local_models import write_indexers, write_model

from mlx_dsa.cli import main
from mlx_dsa.cli.options import open_saved, settings_from
from mlx_dsa.presets import names_of, resolve
from mlx_dsa.saved import read_saved


def run(*arguments, given=""):
    return CliRunner().invoke(main, [str(a) for a in arguments], input=given)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, its indexers, a config file, a text and its cache."""
    root = tmp_path_factory.mktemp("saved")
    write_model(root / "model")
    write_indexers(root / "indexer")
    (root / "text.txt").write_text("A line of plain text. " * 40)
    settings = {"model": "model", "indexer": "indexer", "n_sink": 2, "tile_size": 16}
    (root / "own.json").write_text(json.dumps(settings))
    options = ["--config", root / "own.json", "--top-k", 60, "--n-recent", 20, "--prefill", "exact"]
    result = run("compress", root / "text.txt", "--out", root / "text.kv", *options)
    assert result.exit_code == 0, result.output
    return root


@pytest.fixture
def elsewhere(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_chat_needs_the_file_alone(elsewhere):
    result = run("chat", "--cache-file", elsewhere / "text.kv", "--prompt", "Who?", "--max-tokens", 2)
    assert result.exit_code == 0, result.output
    assert re.search(r"\b60 entries kept a layer", result.output)
    assert "lowered" not in result.output


def test_every_setting_comes_from_the_file(elsewhere):
    settings = settings_from(saved=open_saved(str(elsewhere / "text.kv"), False))
    assert settings.model == str(elsewhere / "model")
    assert settings.indexer == str(elsewhere / "indexer")
    config = settings.config
    assert (config.top_k, config.n_recent, config.n_sink) == (60, 20, 2)
    assert (config.prefill, config.tile_size) == ("exact", 16)


def test_what_does_not_contradict_may_be_said(elsewhere):
    saved = open_saved(str(elsewhere / "text.kv"), False)
    other = settings_from(saved=saved, top_k=60, prefill="dense", indexer="mine")
    assert (other.config.prefill, other.config.n_recent, other.indexer) == ("dense", 20, "mine")
    assert settings_from(saved=saved, model="another/one").model == "another/one"
    assert settings_from(saved=saved, preset="tiny").model == resolve("tiny").model


@pytest.mark.parametrize(
    "options, words",
    [
        (["--top-k", 61], "--top-k 61 contradicts FILE, which was made with 60. Leave it out."),
        (["--n-recent", 21], "--n-recent 21 contradicts FILE, which was made with 20."),
        (["--cache", "full"], "--cache full contradicts FILE, which was made with budget."),
    ],
)
def test_what_contradicts_is_refused_in_one_line(options, words, elsewhere, monkeypatch):
    monkeypatch.setattr("mlx_dsa.cli.session.load_settings", None)  # nothing is loaded
    file = elsewhere / "text.kv"
    result = run("chat", "--cache-file", file, "--prompt", "x", *options)
    assert result.exit_code == 1
    (error,) = [line for line in result.output.splitlines() if line.startswith("Error")]
    assert words.replace("FILE", str(file)) in error


def test_a_config_file_may_contradict_as_little(elsewhere, tmp_path):
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"n_sink": 3}))
    result = run("chat", "--cache-file", elsewhere / "text.kv", "--prompt", "x", "--config", file)
    assert result.exit_code == 1 and "n_sink" in result.output and "made with 2" in result.output


def test_no_cache_is_told_before_anything_is_loaded(elsewhere, monkeypatch):
    monkeypatch.setattr("mlx_dsa.cli.session.load_settings", None)
    for file in (elsewhere / "text.txt", elsewhere / "nowhere.kv"):
        result = run("chat", "--cache-file", file, "--prompt", "x")
        assert result.exit_code == 1 and str(file) in result.output.splitlines()[-1]


def test_a_model_is_named_as_it_is_found_from_anywhere(folder, monkeypatch):
    assert names_of(resolve("qwen3-8b")) == {"preset": "qwen3-8b"}
    assert names_of(resolve("tiny")) == {"preset": "tiny"}
    monkeypatch.chdir(folder)
    own = resolve(None, model="model", indexer="an/other")
    assert names_of(own) == {"model": str(folder / "model"), "indexer": "an/other"}
    assert names_of(resolve("tiny", indexer="indexer"))["indexer"] == str(folder / "indexer")


def test_what_is_saved_is_read_before_loading(folder):
    assert read_saved(folder / "text.kv").config["top_k"] == 60
    assert read_saved(folder / "text.kv").metadata["file"] == "text.txt"


def test_info_looks_into_a_saved_cache(elsewhere, monkeypatch):
    monkeypatch.setattr("mlx_dsa.cli.session.load_settings", None)
    result = run("info", "--cache-file", elsewhere / "text.kv")
    tokens = read_saved(elsewhere / "text.kv").tokens
    assert result.exit_code == 0 and tokens > 60
    assert f"text.kv ({tokens:,} tokens of text.txt, " in result.output
    assert "top_k 60" in result.output and "Cache " not in run("info").output
    refused = run("info", "--cache-file", elsewhere / "text.txt")
    assert refused.exit_code == 1 and str(elsewhere / "text.txt") in refused.output.splitlines()[-1]
    assert run("info", "--dense", "--cache-file", elsewhere / "text.kv").exit_code == 2


def test_a_file_of_a_model_that_is_no_object_is_told_by_info(folder, tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    result = run("info", "--model", tmp_path, "--indexer", folder / "indexer")
    assert result.exit_code == 1
    assert "config.json is not a JSON object" in result.output.splitlines()[-1]
