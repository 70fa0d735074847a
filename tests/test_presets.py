"""Presets: names, merging, local folders in place of the hub, the bundled model."""

import json
import os
import shutil
import warnings
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import pytest
from local_models import write_indexers, write_model
from mlx.utils import tree_flatten
from mlx_lm import stream_generate

from mlx_dsa import IndexerArgs, SparseConfig, load_indexers, load_preset, patch_sparse_generate
from mlx_dsa.hub import fetch
from mlx_dsa.machine import runs_float32
from mlx_dsa.presets import preset_names, preset_of, read_preset, read_settings, resolve, resource


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("local")
    model = write_model(root / "model", quantized=True, dtype=mx.bfloat16)
    return str(model), str(write_indexers(root / "indexer"))


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    def refuse(repo, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError(f"offline: {repo}\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.chdir(tmp_path)


def test_names():
    assert preset_names() == [*("tiny", "qwen2.5-coder-0.5b", "qwen3-0.6b", "qwen3-4b", "qwen3-8b", "smollm2-135m")]


@pytest.mark.parametrize("name", preset_names())
def test_each_preset_is_valid(name):
    settings = resolve(name)
    assert isinstance(settings.config, SparseConfig)
    assert settings.model


def test_big_presets_name_the_hub():
    models = [resolve(n).model for n in preset_names() if n.startswith("qwen3")]
    assert models == [f"mlx-community/Qwen3-{s}-4bit" for s in ("0.6B", "4B", "8B")]
    assert "/" in resolve("qwen3-8b").indexer


@pytest.mark.parametrize("name", ["qwen2.5-coder-0.5b", "smollm2-135m"])
def test_indexers_of_a_hub_model_that_are_shipped(name, folders):
    settings = resolve(name)
    assert settings.model.startswith("mlx-community/")
    assert settings.indexer.endswith(f"weights{os.sep}{name}{os.sep}indexers.safetensors")
    # A copy of the model in a folder of one's own has them too.
    assert resolve(name, model=folders[0]) == settings._replace(model=folders[0])


@pytest.mark.parametrize("name, dim, layers", [("qwen2.5-coder-0.5b", 896, 24), ("smollm2-135m", 576, 30)])
def test_shipped_indexers_are_what_their_cards_say(name, dim, layers):
    path = resolve(name).indexer
    assert os.path.getsize(path) < 12e6
    indexers = load_indexers(path)
    assert sorted(indexers) == list(range(layers))
    shape = IndexerArgs(dim, 4, 64, 32, retention_dim=64, unweighted=True)
    for indexer in indexers.values():
        assert indexer.args == shape
        values = dict(tree_flatten(indexer.parameters()))
        assert all(mx.isfinite(v).all() and v.astype(mx.float32).std() > 0 for v in values.values() if v.size > 1)


def test_paths_of_the_bundled_model_hold_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    settings = resolve("tiny")
    assert os.path.isabs(settings.model) and os.path.isdir(settings.model)
    assert os.path.isfile(settings.indexer)


def test_overrides_win():
    settings = resolve("tiny", top_k=1000, model="here")
    assert settings.model == "here" and settings.config.top_k == 1000


@pytest.mark.parametrize("name, own", [("tiny", 128), ("qwen3-8b", 256), (None, 64)])
def test_a_top_k_alone_lowers_n_recent_to_its_half_and_says_so(name, own):
    model = {} if name else {"model": "here"}
    with pytest.warns(UserWarning, match=f"'n_recent' is lowered from {own} to 50") as said:
        assert resolve(name, top_k=100, **model).config.n_recent == 50
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve(name, top_k=2 * own, **model).config.n_recent == own
        assert resolve(name, top_k=100, n_recent=90, **model).config.n_recent == 90
        with pytest.raises(ValueError, match="n_sink"):
            resolve(name, top_k=100, n_recent=100, **model)


def test_without_a_preset_the_defaults_hold():
    settings = resolve(None, model="here")
    assert settings == ("here", None, SparseConfig())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(name="huge"), "must be one of tiny"),
        (dict(name=None), "no model is named"),
        (dict(name="tiny", topk=4), "unknown key 'topk'"),
        (dict(name="tiny", top_k=0), "'top_k'"),
        (dict(name="tiny", top_k=-9), "'top_k'"),
        (dict(name="tiny", top_k=35, n_recent=32), "n_sink + n_recent"),
    ],
)
def test_resolve_refuses(arguments, words):
    with pytest.raises(ValueError) as caught:
        resolve(**arguments)
    assert words in str(caught.value)


def test_a_file_names_folders_beside_it(tmp_path):
    (tmp_path / "mine").mkdir()
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"model": "mine", "indexer": "a/b", "top_k": 99}))
    assert read_settings(file) == {
        "model": str(tmp_path / "mine"),
        "indexer": "a/b",
        "top_k": 99,
    }


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"topk": 1}', "unknown key 'topk'"),
        ("{", "is not JSON"),
        ("[1]", "must hold a JSON object"),
        (b"\xff\xfe\x00", "is not JSON"),
    ],
)
def test_read_settings_refuses(tmp_path, text, words):
    file = tmp_path / "settings.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as caught:
        read_settings(file)
    assert words in str(caught.value) and str(file) in str(caught.value)


def test_a_hub_preset_loads_from_local_folders(folders):
    model, indexer = folders
    preset = load_preset("qwen3-8b", model=model, indexer=indexer, top_k=128, n_recent=64)
    assert sorted(preset.indexers) == [0, 1]
    assert preset.config == SparseConfig(top_k=128)
    with patch_sparse_generate(preset.model, preset.indexers, **vars(preset.config)):
        prompt = list(range(10, 260))
        replies = list(stream_generate(preset.model, preset.tokenizer, prompt, max_tokens=3))
    assert replies[-1].generation_tokens <= 3


def test_a_hub_preset_fetches_its_repositories(folders, monkeypatch, tmp_path):
    fetched = []

    def snapshot(repo, **options):
        fetched.append(repo)
        return folders[0] if repo.startswith("mlx-community/") else folders[1]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    load_preset("qwen3-8b")
    assert sorted(fetched) == sorted(read_preset("qwen3-8b")[k] for k in ("model", "indexer"))


@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen3-4b"])
def test_a_preset_without_published_indexers_says_so(name, no_hub):
    with pytest.raises(ValueError, match="no indexers are known"):
        load_preset(name)


def test_the_hub_out_of_reach_is_one_line(no_hub):
    with pytest.raises(FileNotFoundError) as caught:
        fetch("owner/name")
    assert "offline: owner/name" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "nowhere"])
def test_a_path_is_never_asked_of_the_hub(name, no_hub):
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        fetch(name)


def test_linux_cpus_run_float32(folders):
    preset = load_preset(None, model=folders[0], indexer=folders[1])
    norm = preset.model.layers[0].input_layernorm.weight
    assert norm.dtype == (mx.float32 if runs_float32() else mx.bfloat16)


@pytest.mark.parametrize("kept", [0.5, 0.01])
def test_a_truncated_model_is_refused(tmp_path, kept):
    folder = write_model(tmp_path / "model")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match="cannot load the model"):
        load_preset(None, model=str(folder), indexer=str(write_indexers(tmp_path / "i")))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("broken, words", [("{", "is not JSON"), ("[1]", "is not a JSON object")])
def test_the_file_that_is_broken_is_named(name, broken, words, tmp_path):
    folder = write_model(tmp_path / "model")
    (folder / "notes.json").write_text("[1]")  # nobody reads it
    (folder / name).write_text(broken)
    with pytest.raises(ValueError, match=f"{name} {words}") as told:
        load_preset(None, model=str(folder), indexer=str(write_indexers(tmp_path / "i")))
    assert "notes.json" not in str(told.value)


def test_an_unknown_model_type_is_refused(tmp_path):
    folder = write_model(tmp_path / "model", model_type="nosuch")
    with pytest.raises(ValueError, match="nosuch"):
        load_preset(None, model=str(folder), indexer=str(write_indexers(tmp_path / "i")))


def test_the_bundled_model_loads():
    preset = load_preset("tiny")
    assert preset._fields == ("model", "tokenizer", "indexers", "config")
    assert len(preset.indexers) == len(preset.model.layers)
    assert preset.config.top_k == 256


def test_a_missing_resource_is_told():
    with pytest.raises(FileNotFoundError, match="Install the package again"):
        resource("configs/nowhere.json")


# Settings go with the model


@pytest.mark.parametrize("name", preset_names())
def test_a_model_brings_its_presets_settings(name):
    assert resolve(None, model=resolve(name).model) == resolve(name)


def test_a_model_is_known_in_the_hubs_cache_too(tmp_path, monkeypatch):
    folder = tmp_path / "models--mlx-community--Qwen3-8B-4bit" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    for model in (folder, os.path.relpath(folder)):
        assert preset_of(str(model)) == "qwen3-8b"
        settings = resolve(None, model=str(model))
        assert settings.indexer == resolve("qwen3-8b").indexer
        assert settings.config == resolve("qwen3-8b").config
    monkeypatch.chdir(resource("weights/tiny"))
    assert preset_of(".") == "tiny"
    with pytest.raises(ValueError, match="no model is named"):
        resolve(None)


@pytest.mark.parametrize("model", ["mlx-community/Qwen3-8B-8bit", "else/Qwen3-8B-4bit", "nowhere"])
def test_another_model_is_in_no_preset(model):
    assert preset_of(model) is None


def test_indexers_in_the_models_folder_are_its_own(folders, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(folders[0], model)
    assert resolve(None, model=str(model)).indexer is None
    write_indexers(model)
    file = str(model / "indexers.safetensors")
    for preset in (None, "tiny", "qwen3-8b"):  # nearer than a preset's
        assert resolve(preset, model=str(model)).indexer == file
        assert resolve(preset, model=str(model), indexer="mine").indexer == "mine"
    loaded = load_preset(None, model=str(model))
    assert sorted(loaded.indexers) == [0, 1]


def test_paths_in_a_file_are_relative_to_it(tmp_path, monkeypatch):
    (tmp_path / "settings").mkdir()
    (tmp_path / "elsewhere" / "weights").mkdir(parents=True)
    (tmp_path / "elsewhere" / "cold").write_text("")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    file = tmp_path / "settings" / "s.json"
    for given, found in [
        ("weights", tmp_path / "settings" / "weights"),  # not the one that is here
        ("./weights", tmp_path / "settings" / "weights"),
        ("../owner/name", tmp_path / "owner" / "name"),
        (str(tmp_path / "weights"), tmp_path / "weights"),
        ("~/weights", Path.home() / "weights"),
        ("owner/name", "owner/name"),
    ]:
        file.write_text(json.dumps({"model": given, "indexer": given}))
        assert read_settings(file) == {"model": str(found), "indexer": str(found)}
    for given in ("cold", "new/cold"):
        file.write_text(json.dumps({"cache": "tiered", "cold_file": given}))
        assert read_settings(file)["cold_file"] == str(tmp_path / "settings" / given)


@pytest.mark.parametrize("key", ["model", "indexer", "cold_file"])
def test_a_path_that_is_no_text_is_refused(key, tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({key: 5}))
    with pytest.raises(ValueError, match=f"'{key}' in .* must be a text"):
        read_settings(file)
    file.write_text(json.dumps({key: None}))
    assert read_settings(file) == {key: None}
