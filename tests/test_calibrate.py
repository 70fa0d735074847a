"""mlx-dsa calibrate: files of what was found of a model's heads, and the run that makes them."""

import json
import os
import signal

import mlx.core as mx
import numpy as np
import pytest
from builders import layer_of, make_model, make_tokenizer
from calibrations import FOUND, calibrations_for
from click.testing import CliRunner
from family_models import FAMILIES, family_model
from local_models import write_indexers, write_model
from mlx_lm.models.cache import make_prompt_cache

from mlx_dsa import load_cache, load_indexers, patch_sparse_generate, save_cache
from mlx_dsa.calibrate import CALIBRATIONS, CalibrateConfig, calibrate
from mlx_dsa.calibrated import Calibration, digits_of, load_calibration, save_calibration
from mlx_dsa.cli import main
from mlx_dsa.families import family_of
from mlx_dsa.train.teacher import layer_views

CONFIG = CalibrateConfig(sequences=3, sequence_length=64, chunk_size=16, top_k=24, n_sink=2, n_recent=4, density=0.4)
RULES = list(CALIBRATIONS)
SMALL_TEXT = {"minference": "minference:block=16"}  # where a block has room in top_k


def arrays_of(calibrations):
    return {(i, name): np.array(a) for i, c in calibrations.items() for name, a in c.found.items()}


def same(one, other):
    one, other = arrays_of(one), arrays_of(other)
    return one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one)


def write_text(folder, n=220, seed=0):
    words = np.random.default_rng(seed).integers(0, 101, n)
    file = folder / f"text{seed}.txt"
    file.write_text(" ".join(f"w{i}" for i in words))
    return file


def test_every_rule_that_reads_a_calibration_has_one():
    assert set(RULES) == set(FOUND)


@pytest.mark.parametrize("kind", RULES)
def test_a_file_gives_back_what_was_saved(kind, tmp_path):
    model = make_model()
    made = calibrations_for(model, kind)
    file = save_calibration(tmp_path / "it", made, {"note": 1})
    assert json.loads((tmp_path / "it" / "run_config.json").read_text())["note"] == 1
    for path in (file, file.parent):
        loaded = load_calibration(path, kind)
        assert same(loaded, made) and [c.digits for c in loaded.values()] == [c.digits for c in made.values()]
        assert {c.model for c in loaded.values()} == {"some/model"}


def test_a_layer_is_known_by_its_weights_in_any_wider_dtype():
    model = make_model(dtype=mx.bfloat16)
    before = digits_of(layer_of(model))
    assert digits_of(layer_of(model, 1)) != before
    model.set_dtype(mx.float32)
    assert digits_of(layer_of(model)) == before
    weight = model.layers[0].self_attn.k_proj.weight
    weight[3, 5] = weight[3, 5] + 1e-3
    assert digits_of(layer_of(model)) != before
    quantized = make_model(quantized=True)
    before = digits_of(layer_of(quantized))
    quantized.layers[0].self_attn.k_proj.weight[0, 0] ^= 1
    assert digits_of(layer_of(quantized)) != before


@pytest.mark.parametrize("kind", RULES)
def test_another_models_is_refused_in_one_line(kind, tmp_path):
    made = load_calibration(save_calibration(tmp_path, calibrations_for(make_model(), kind)), kind)
    for other in (make_model(seed=1), make_model(heads=8)):
        with pytest.raises(ValueError, match="is of some/model, and this is another model") as error:
            patch_sparse_generate(
                other, made, 24, n_recent=4, n_sink=2, select=SMALL_TEXT.get(kind, kind), cache="full"
            )
        assert "\n" not in str(error.value) and f"calibrate --rule {kind}" in str(error.value)
    patch_sparse_generate(
        make_model(), made, 24, n_recent=4, n_sink=2, select=SMALL_TEXT.get(kind, kind), cache="full"
    ).restore()


def test_files_of_other_kinds_are_refused(tmp_path):
    model = make_model()
    file = save_calibration(tmp_path / "it", calibrations_for(model, "double_sparsity"))
    with pytest.raises(
        ValueError, match="holds channels of keys, not lightning indexers. Use select='double_sparsity'"
    ):
        load_indexers(file)
    write_indexers(tmp_path / "indexer")
    with pytest.raises(ValueError, match="holds lightning indexers, not channels of keys"):
        load_calibration(tmp_path / "indexer", "double_sparsity")
    with pytest.raises(ValueError, match="indexers given are for select='double_sparsity'"):
        patch_sparse_generate(model, load_calibration(file, "double_sparsity"), 24, n_recent=4, cache="full")
    with pytest.raises(ValueError, match="'kind' must be one of"):
        load_calibration(file, "lightning")
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match="damaged"):
        load_calibration(file, "double_sparsity")


def test_a_file_whose_header_lacks_something_is_no_calibration(tmp_path):
    for header in ({}, {"model": "a"}, {"model": "a", "digits": "no"}, {"model": "a", "digits": '{"1": ""}'}):
        file = tmp_path / "x.safetensors"
        mx.save_safetensors(str(file), {"layers.0.channels": mx.zeros(2)}, {"kind": "double_sparsity", **header})
        with pytest.raises(ValueError, match="is not a whole calibration"):
            load_calibration(file, "double_sparsity")


@pytest.mark.parametrize("rule", RULES)
def test_a_run_that_is_stopped_goes_on_to_the_same_end(rule, tmp_path):
    model, data, told = make_model(), write_text(tmp_path), []
    given = model, make_tokenizer(), data
    whole = calibrate(*given, tmp_path / "whole", rule, CONFIG, name="its/name", progress=told.append)
    assert [(p.done, p.total) for p in told] == [(0, 3), (1, 3), (2, 3), (3, 3)] and told[-1].tokens == 192
    assert whole.told and not whole.left_out

    def stop(progress):
        if progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(*given, tmp_path / "cut", rule, CONFIG, progress=stop)
    with pytest.raises(ValueError, match="holds an unfinished run"):
        calibrate(*given, tmp_path / "cut", rule, CONFIG)
    for change in (dict(data=write_text(tmp_path, seed=1)), dict(model=make_model(seed=1)), dict(config=True)):
        config = CalibrateConfig(**{**vars(CONFIG), "n_recent": 5}) if "config" in change else CONFIG
        words = change.get("model", model), given[1], change.get("data", data), tmp_path / "cut", rule, config
        with pytest.raises(ValueError, match=f"holds a run with another {next(iter(change))}"):
            calibrate(*words, resume=True)
    again = []
    cut = calibrate(*given, tmp_path / "cut", rule, CONFIG, resume=True, name="its/name", progress=again.append)
    assert [p.done for p in again] == [2, 3]
    files = [load_calibration(result.path, rule) for result in (whole, cut)]
    assert same(*files) and {c.model for c in files[0].values()} == {"its/name"}
    assert not list((tmp_path / "cut").glob("checkpoint*"))
    with pytest.raises(ValueError, match="holds finished"):
        calibrate(*given, tmp_path / "cut", rule, CONFIG, resume=True)
    # And it is what the rule reads.
    rules = dict(n_sink=2, n_recent=4, select=SMALL_TEXT.get(rule, rule), cache="full", prefill="exact")
    with patch_sparse_generate(model, files[0], 24, **rules):
        assert mx.isfinite(model(mx.arange(60)[None])).all()


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_family_selects_by_a_calibration(family, kind):
    model, tokens = family_model(family), mx.arange(60)[None]
    finder, layers = CALIBRATIONS[kind](CONFIG), family_of(model).layers(model)
    shown = {i: finder.measure(layers[i], view) for i, view in layer_views(model, tokens, 16)}
    found, _ = finder.conclude(shown)
    made = {i: Calibration(kind, found[i], "a", digits_of(layers[i])) for i in found}
    rules = dict(n_sink=2, n_recent=4, select=SMALL_TEXT.get(kind, kind), cache="full", prefill="exact")
    with patch_sparse_generate(model, made, 24, **rules):
        caches = make_prompt_cache(model)
        whole = model(tokens, cache=caches)
        step = model(tokens[:, :1], cache=caches)
    assert mx.isfinite(whole).all() and mx.isfinite(step).all()
    assert mx.abs(whole - model(tokens)).max() > 1e-4


@pytest.mark.parametrize("kind", RULES)
def test_a_saved_conversation_goes_on_with_its_calibration_alone(kind, tmp_path):
    model, tokens = make_model(), mx.arange(80)[None]
    rules = dict(n_sink=2, n_recent=4, select=SMALL_TEXT.get(kind, kind), cache="full", prefill="exact")
    made = calibrations_for(model, kind)
    with patch_sparse_generate(model, made, 24, **rules) as patch:
        caches = make_prompt_cache(model)
        with patch.reading(caches):
            model(tokens[:, :60], cache=caches)
        file = save_cache(tmp_path / "it.kv", caches, patch)
        loaded = load_cache(file, patch).caches
        for i in range(60, 70):
            there, here = (model(tokens[:, i : i + 1], cache=c) for c in (loaded, caches))
            assert mx.array_equal(there, here)
    for calibration in made.values():
        name, there = next(iter(calibration.found.items()))
        assert (there[0] != there[1]).any()
        setattr(calibration, f"_{name}", mx.concatenate([there[1:], there[:1]]))
    with patch_sparse_generate(model, made, 24, **rules) as patch:
        with pytest.raises(ValueError, match="another form of indexer"):
            load_cache(file, patch)


def test_a_text_that_is_short_is_told(tmp_path):
    given = make_model(), make_tokenizer(), write_text(tmp_path, n=100)
    result = calibrate(*given, tmp_path / "out", "double_sparsity", CONFIG)
    assert result.told[-1] == "The text has 2 of the 3 sequences that were asked for."


def test_what_a_run_needs_is_told(tmp_path):
    model, tokenizer, data = make_model(), make_tokenizer(), write_text(tmp_path)
    with pytest.raises(ValueError, match="'rule' must be one of"):
        calibrate(model, tokenizer, data, tmp_path / "a", "quest", CONFIG)
    with pytest.raises(ValueError, match="'sequences' must be a whole number of at least 1 but got 0"):
        CalibrateConfig(sequences=0)
    with pytest.raises(ValueError, match="'top_k' must be at least n_sink . n_recent = 68 but got 60"):
        CalibrateConfig(top_k=60)
    with pytest.raises(ValueError, match="'density' must be above 0 and at most 1 but got 1.5"):
        CalibrateConfig(density=1.5)
    with pytest.raises(ValueError, match="'density' must be at least .n_sink . n_recent. / top_k = 0.2500 but got 0.2"):
        given = CalibrateConfig(**{**vars(CONFIG), "density": 0.2})
        calibrate(model, tokenizer, data, tmp_path / "a", "mixture", given)
    with pytest.raises(ValueError, match="'sequence_length' must exceed 64 but got 64"):
        given = CalibrateConfig(sequence_length=64, top_k=64, n_recent=8)
        calibrate(model, tokenizer, data, tmp_path / "a", "minference", given)
    with patch_sparse_generate(model, None, 24, n_recent=4, select="window", evict="window"):
        with pytest.raises(ValueError, match="must be unpatched"):
            calibrate(model, tokenizer, data, tmp_path / "a", "double_sparsity", CONFIG)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "checkpoint.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="is not a checkpoint of a calibration"):
        calibrate(model, tokenizer, data, tmp_path / "cut", "double_sparsity", CONFIG, resume=True)


def command(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


SMALL = ("--sequences", 2, "--sequence-length", 64, "--top-k", 32, "--n-recent", 8, "--n-sink", 2, "--density", 0.5)


@pytest.mark.parametrize("rule", RULES)
def test_the_command_makes_a_file_that_the_others_read(rule, tmp_path):
    model = write_model(tmp_path / "the-model")
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten. " * 60)
    words = "calibrate", "--rule", rule, "--model", model, "--data", tmp_path / "text.txt", "--out", tmp_path / "out"
    run = command(*words, *SMALL)
    assert run.exit_code == 0, run.output
    assert f"--select {rule} --indexer {tmp_path / 'out'}" in " ".join(run.output.split())
    settings = "--select", SMALL_TEXT.get(rule, rule), "--indexer", tmp_path / "out", "--top-k", 32, "--n-recent", 8
    settings += "--evict", "window", "--cache", "full"
    answers = []
    for prefill in ("exact", "dense"):
        words = "generate", "--model", model, "--prompt", "a b c d e f g " * 20, "--max-tokens", 6, *settings
        run = command(*words, "--prefill", prefill)
        assert run.exit_code == 0, run.output
        answers.append(run.output)
    told = command("info", "--model", model, *settings).output
    assert f"calibrated on the-model for --select {rule}" in " ".join(told.split())
    other = write_model(tmp_path / "other")
    run = command("generate", "--model", other, "--prompt", "a " * 99, *settings)
    assert run.exit_code == 1 and "is of the-model, and this is another model" in " ".join(run.output.split())
    assert "Traceback" not in run.output
    run = command("generate", "--model", model, "--prompt", "a", "--select", SMALL_TEXT.get(rule, rule), "--top-k", 32)
    assert run.exit_code == 1 and "no indexers are known" in run.output


def test_ctrl_c_ends_the_command_after_a_sequence(tmp_path, monkeypatch):
    model = write_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten. " * 60)
    words = "calibrate", "--rule", "double_sparsity", "--model", model, "--data", tmp_path / "text.txt"
    words += "--out", tmp_path / "out", *SMALL
    finder = CALIBRATIONS["double_sparsity"]
    original = finder.measure

    def measure(self, layer, view):
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, layer, view)

    def refused(run, code, text):
        assert run.exit_code == code and text in run.output, run.output

    refused(command(*words, "--resume"), 2, "there is no run in")
    with monkeypatch.context() as patch:
        patch.setattr(finder, "measure", lambda self, layer, view: measure(self, layer, view) if layer.index == 0
                      else original(self, layer, view))  # fmt: skip
        refused(command(*words), 130, "The same command with --resume goes on.")
    refused(command(*words), 1, "holds an unfinished run")
    refused(command(*words, "--resume"), 0, "Wrote")
    refused(command(*words), 1, "holds finished")
    refused(command(*words, "--preset", "tiny"), 2, "exclude each other")
