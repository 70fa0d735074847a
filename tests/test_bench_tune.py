"""Crossovers: found, stored, looked up for what they were measured on alone."""

import json
import sys
import warnings
from datetime import datetime, timedelta

import mlx.core as mx
import pytest
from builders import feed, make_indexers, make_model, make_tokens
from click.testing import CliRunner
from local_models import write_indexers, write_model

import mlx_dsa
from mlx_dsa import SparseConfig, crossovers, patch_sparse_generate
from mlx_dsa.bench import tune
from mlx_dsa.cli import main
from mlx_dsa.crossovers import PrefillPlan, describe, lookup, measured, plan_prefill, store

RULES = dict(top_k=24, n_sink=2, n_recent=8, tile_size=8, evict="index")
CONFIG = SparseConfig(**RULES)
FOUND = {"tile": 48, "exact": None, "decode": 96}


@pytest.fixture(autouse=True)
def empty_store(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_DSA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def subject():
    model = make_model()
    return model, make_indexers(model)


def timed_by(monkeypatch, times):
    """Replace what is timed by a function of the keys; return the lengths asked for."""
    asked = []

    def measure(self, keys):
        asked.append(keys)
        return times(keys)

    module = sys.modules["mlx_dsa.bench.tune"]  # bench.tune is the function
    monkeypatch.setattr(module._Bench, "measure", measure)
    return asked


def test_real_layers_are_timed_and_the_result_is_stored(subject):
    model, indexers = subject
    rows = []
    result = tune(model, indexers, CONFIG, chunk=32, repeats=1, report=rows.append)
    assert set(result["crossovers"]) == {"tile", "exact", "decode"}
    assert result["left_out"] == {}
    names = {"keys", "dense", "exact", "tile", "dense_decode", "decode"}
    assert all(set(row) == names and min(row.values()) > 0 for row in rows)
    assert {row["keys"] for row in rows} == {row["keys"] for row in result["rows"]}
    found = measured(describe(model, indexers, CONFIG))
    assert found.crossovers == result["crossovers"]
    assert found.lengths == tuple(sorted(row["keys"] for row in rows))
    assert abs(datetime.now() - datetime.fromisoformat(found.when)) < timedelta(minutes=5)


def test_entries_that_are_numbered_anew_are_timed_too(subject):
    """What a budget alone can do: prompts are timed with caches that keep all."""
    config = SparseConfig(**RULES | {"evict": "keydiff"}, positions="compact", prefill="stream")
    result = tune(*subject, config, chunk=32, repeats=1)
    assert set(result["crossovers"]) == {"tile", "exact", "decode"}


def test_the_model_is_left_unpatched(subject):
    attentions = [layer.self_attn for layer in subject[0].layers]
    tune(*subject, CONFIG, chunk=32, repeats=1, seconds=0.01)
    assert [layer.self_attn for layer in subject[0].layers] == attentions


def test_crossovers_are_bisected(subject, monkeypatch):
    # Dense costs its keys; tile wins from 100, exact from 700, decode never.
    asked = timed_by(
        monkeypatch,
        lambda keys: {
            "dense": keys, "tile": 100, "exact": 700, "dense_decode": 1, "decode": 2,
        },
    )  # fmt: skip
    result = tune(*subject, CONFIG)
    # Doubling from 48 (2 top_k), then two halvings: 96 < 108 <= 192, 384 < 672 + 96.
    assert result["crossovers"] == {"tile": 120, "exact": 768, "decode": None}
    assert result["longest"] == 48 * 2**5 == max(asked)
    assert len(asked) == len(set(asked))


def test_a_way_that_wins_at_once_is_looked_for_below(subject, monkeypatch):
    def times(keys):
        return {"dense": keys, "tile": 1, "exact": 1, "dense_decode": 2, "decode": 1}

    asked = timed_by(monkeypatch, times)
    result = tune(*subject, CONFIG)
    assert max(asked) == 48 and min(asked) == 30
    assert set(result["crossovers"].values()) == {30}


def test_time_ends_the_search(subject, monkeypatch):
    def times(keys):
        clock.now += keys  # a measurement takes as many seconds
        return {"dense": 1, "tile": 2, "exact": 2, "dense_decode": 1, "decode": 2}

    def clock():
        return clock.now

    clock.now = 0
    asked = timed_by(monkeypatch, times)
    result = tune(*subject, CONFIG, seconds=700, clock=clock)
    # The next would take 384 more than the 336 so far.
    assert asked == [48, 96, 192] and result["longest"] == 192
    assert set(result["crossovers"].values()) == {None}
    # Longer ones may win: that is not known, and so not stored.
    assert set(result["left_out"]) == set(FOUND) and result["file"] is None
    assert result["left_out"]["tile"].startswith("slower up to 192 keys")
    assert not crossovers.crossover_file().exists()
    with patch_sparse_generate(*subject, **RULES) as patch:
        assert patch.layers[0].prefill == "tile"


@pytest.mark.parametrize("seconds, n_lengths", [(0, 0), (1, 1)])
def test_one_length_or_none_is_no_comparison(subject, monkeypatch, seconds, n_lengths):
    def times(keys):
        clock.now += 1
        return {"dense": 2, "tile": 1, "exact": 1, "dense_decode": 2, "decode": 1}

    def clock():
        return clock.now

    clock.now = 0
    asked = timed_by(monkeypatch, times)
    result = tune(*subject, CONFIG, seconds=seconds, clock=clock)
    assert len(asked) == len(result["rows"]) == n_lengths
    assert result["file"] is None and set(result["left_out"]) == set(FOUND)
    assert lookup(describe(*subject, CONFIG)) is None


def test_a_way_that_top_k_has_no_room_for_is_not_said_to_be_slower(subject, monkeypatch):
    narrow = SparseConfig(**{**RULES, "n_recent": 20})  # tiles of 8 don't fit 24
    timed_by(monkeypatch, lambda keys: {"dense": 1, "exact": 2, "dense_decode": 1, "decode": 2})
    result = tune(*subject, narrow)
    assert result["crossovers"] == {"exact": None, "decode": None}
    assert "no room for a tile of 8" in result["left_out"]["tile"]
    found = lookup(describe(*subject, CONFIG))  # the same but for n_recent
    assert found == result["crossovers"]
    assert plan_prefill(found, CONFIG) == PrefillPlan("tile", 24)  # by the rule
    assert plan_prefill(found, narrow) == PrefillPlan("dense", 24)


def test_a_way_begins_to_win_after_the_last_length_at_which_it_lost(subject, monkeypatch):
    def times(keys):  # an odd loss at 96
        slow = 2 if keys == 96 or keys < 40 else 0
        return {"dense": 1, "tile": slow, "exact": 2, "dense_decode": 1, "decode": 0}

    timed_by(monkeypatch, times)
    result = tune(*subject, CONFIG)
    assert result["crossovers"]["tile"] == 120 and result["crossovers"]["decode"] == 30


def test_top_k_beyond_the_positions_is_refused(subject):
    with pytest.raises(ValueError, match="half of the model's 4,096 positions"):
        tune(*subject, SparseConfig(top_k=3000))


# The store.


def test_what_is_stored_is_found_and_replaced(subject):
    description = describe(*subject, CONFIG)
    assert lookup(description) is None
    store(description, FOUND)
    store({**description, "top_k": 7}, {**FOUND, "tile": 1})
    assert lookup(description) == FOUND
    store(description, {**FOUND, "tile": 50})
    assert lookup(description)["tile"] == 50
    assert len(json.loads(crossovers.crossover_file().read_text())) == 2
    assert [f.name for f in crossovers.crossover_file().parent.iterdir()] == ["crossovers.json"]


OTHERS = {
    "layers": dict(layers=3),
    "heads": dict(heads=8, head_dim=16),
    "width": dict(hidden=96),
    "bits": dict(quantized=True),
    "dtype": dict(dtype=mx.float16),
}


@pytest.mark.parametrize("change", OTHERS)
def test_another_model_is_another_measurement(subject, change):
    store(describe(*subject, CONFIG), FOUND)
    model = make_model(**OTHERS[change])
    assert lookup(describe(model, make_indexers(model), CONFIG)) is None


def test_other_indexers_are_another_measurement(subject):
    store(describe(*subject, CONFIG), FOUND)
    for shape in (dict(n_heads=4), dict(head_dim=16)):
        assert lookup(describe(subject[0], make_indexers(subject[0], **shape), CONFIG)) is None


@pytest.mark.parametrize("change", [dict(top_k=32), dict(tile_size=4), dict(backend="reference")])
def test_other_settings_are_another_measurement(subject, change):
    store(describe(*subject, CONFIG), FOUND)
    assert lookup(describe(*subject, SparseConfig(**{**RULES, **change}))) is None
    same = SparseConfig(**{**RULES, "cache": "full", "n_recent": 4})
    assert lookup(describe(*subject, same)) == FOUND


@pytest.mark.parametrize("what", ["mlx", "mlx-dsa", "device"])
def test_other_versions_and_devices_are_another_measurement(subject, monkeypatch, what):
    store(describe(*subject, CONFIG), FOUND)
    if what == "mlx":
        monkeypatch.setattr(crossovers, "package_version", lambda name: "9.9")
    elif what == "mlx-dsa":
        monkeypatch.setattr(mlx_dsa, "__version__", "9.9")
    else:
        monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "another"})
    assert lookup(describe(*subject, CONFIG)) is None


BROKEN = ["{", "7", '[{"of": 3}]', '[{"of": {}, "from": {"tile": "48"}}]', "\x00\xff"]


@pytest.mark.parametrize("text", BROKEN)
def test_a_damaged_file_is_told_in_one_line_and_not_used(subject, text):
    file = crossovers.crossover_file()
    file.parent.mkdir(parents=True)
    file.write_bytes(text.encode("latin-1"))
    with pytest.warns(UserWarning, match="cannot be read and is not used") as told:
        with patch_sparse_generate(*subject, **RULES) as patch:
            assert patch.layers[0].dense_until == 24
    told = [w for w in told if "cannot be read" in str(w.message)]
    assert len(told) == 1
    assert len(str(told[0].message).splitlines()) == 1
    with pytest.warns(UserWarning):
        store(describe(*subject, CONFIG), FOUND)  # and is replaced
    assert lookup(describe(*subject, CONFIG)) == FOUND


def test_entries_of_older_versions_are_not_used_and_go(subject):
    """They said "never faster" of what was never measured."""
    description = describe(*subject, CONFIG)
    file = crossovers.crossover_file()
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps([{"of": description, "from": dict.fromkeys(FOUND)}]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measured(description) is None
        store({**description, "top_k": 7}, FOUND)
    assert [e["of"]["top_k"] for e in json.loads(file.read_text())] == [7]


@pytest.mark.parametrize(
    "change",
    [
        {"from": {"tiles": 3}},
        {"from": {"tile": 3.5}},
        {"lengths": 3},
        {"lengths": ["3"]},
        {"when": 3},
        {"when": "today", "lengths": None},
    ],
)
def test_a_damaged_entry_is_not_used(subject, change):
    description = describe(*subject, CONFIG)
    entry = {"of": description, "from": FOUND, "lengths": [24, 48], "when": "today"}
    file = crossovers.crossover_file()
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps([entry]))
    assert lookup(description) == FOUND
    file.write_text(json.dumps([{**entry, **change}]))
    with pytest.warns(UserWarning, match="cannot be read and is not used"):
        assert lookup(description) is None


def test_the_file_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("MLX_DSA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert crossovers.crossover_file() == tmp_path / "mlx-dsa" / "crossovers.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    home = tmp_path / "home" / ".cache" / "mlx-dsa" / "crossovers.json"
    assert crossovers.crossover_file() == home


# What "auto" makes of it.


@pytest.mark.parametrize(
    "tile, exact, top_k, plan",
    [
        (48, None, 24, ("tile", 48)),
        (48, 30, 24, ("tile", 48)),
        (None, 60, 24, ("exact", 60)),
        (None, None, 24, ("dense", 24)),
        (48, 60, 12, ("exact", 60)),  # no room for a tile
        (20, None, 24, ("tile", 24)),
        # What was not measured is not taken for slower.
        (..., ..., 24, ("tile", 24)),
        (..., None, 24, ("tile", 24)),
        (..., 60, 24, ("exact", 60)),
        (None, ..., 24, ("dense", 24)),
        (None, ..., 12, ("exact", 12)),
        (..., None, 12, ("dense", 12)),
    ],
)
def test_plans(tile, exact, top_k, plan):
    config = SparseConfig(**{**RULES, "top_k": top_k})
    found = {"tile": tile, "exact": exact, "decode": None}
    found = {way: start for way, start in found.items() if start is not ...}
    assert plan_prefill(found, config) == PrefillPlan(*plan)


@pytest.mark.parametrize("prefill", ["auto", "tile"])
def test_auto_alone_follows_the_measurement(subject, prefill):
    store(describe(*subject, CONFIG), FOUND)
    tokens = make_tokens(100)
    _, dense = feed(subject[0], tokens, 100)
    with patch_sparse_generate(*subject, **RULES, prefill=prefill) as patch:
        layer = patch.layers[0]
        assert (layer.prefill, layer.dense_until) == ("tile", 48 if prefill == "auto" else 24)
        _, sparse = feed(subject[0], tokens, 100)
    same = mx.abs(sparse - dense).max(axis=(0, 2)) < 1e-4
    assert same[: layer.dense_until].all() and not same[layer.dense_until :].all()


def test_auto_is_dense_where_sparse_never_won(subject):
    store(describe(*subject, CONFIG), dict.fromkeys(FOUND))
    tokens = make_tokens(100)
    _, dense = feed(subject[0], tokens, 100)
    with patch_sparse_generate(*subject, **RULES) as patch:
        assert patch.layers[0].prefill == "dense"
        _, sparse = feed(subject[0], tokens, 100)
    assert mx.abs(sparse - dense).max() < 1e-4


# The commands.


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("local")
    model, indexer = write_model(root / "model"), write_indexers(root / "indexer")
    return ["--model", str(model), "--indexer", str(indexer), "--top-k", "200"]


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_tune_stores_and_info_shows(folders, monkeypatch):
    def times(keys):
        return {"dense": keys, "tile": 500, "exact": 1e9, "dense_decode": 2, "decode": 1}

    before = run("info", *folders).output
    assert "Tuned     not yet" in before
    timed_by(monkeypatch, times)
    result = run("tune", *folders)
    assert result.exit_code == 0, result.output
    file = str(crossovers.crossover_file())
    for words in ("prefill by tile: faster than dense from 600 keys", f"Wrote {file}",
                  "exact prefill: not faster than dense up to 6,400 keys",
                  "decode: faster than dense from the shortest measured, 250 keys"):  # fmt: skip
        assert words in result.output
    (line,) = [x for x in run("info", *folders).output.splitlines() if x[:5] == "Tuned"]
    assert "prefill auto is tile, dense up to 600 keys (" in line and file in line
    assert f"measured {datetime.now():%Y-%m-%d} " in line
    assert "float32 and weights as they are at 9 lengths from 250 to 6,400 keys" in line
    other = run("info", *folders, "--prefill", "exact").output
    assert "(not used: prefill is set)" in other
    assert "not yet" in run("info", *folders[:-1], "201").output


def test_a_tune_without_time_says_so(folders):
    result = run("tune", *folders, "--seconds", "0")
    assert result.exit_code == 0, result.output
    assert result.output.count("not known: there was no time to measure it") == 3
    assert "Nothing is stored: give --seconds more." in result.output
    assert not crossovers.crossover_file().exists()
    assert "Tuned     not yet" in run("info", *folders).output


def test_what_was_measured_is_forgotten(folders, monkeypatch):
    times = {"dense": 2, "tile": 1, "exact": 1, "dense_decode": 2, "decode": 1}
    timed_by(monkeypatch, lambda keys: times)
    others = [*folders[:-1], "220"]
    assert "Nothing was stored." in run("tune", *folders, "--reset").output
    assert run("tune", *folders).exit_code == run("tune", *others).exit_code == 0
    result = run("tune", *folders, "--reset")
    assert result.exit_code == 0 and "is forgotten (" in result.output
    assert "Tuned     not yet" in run("info", *folders).output
    assert "faster than dense from the shortest measured, 275 keys" in run("info", *others).output
    refused = run("tune", "--reset", "--all", *folders)
    assert refused.exit_code == 2 and "leave --model out" in refused.output
    assert run("tune", "--all").exit_code == 2
    result = run("tune", "--reset", "--all")
    assert result.exit_code == 0 and "All measurements are forgotten" in result.output
    assert not crossovers.crossover_file().exists()
    assert "Nothing was stored." in run("tune", "--reset", "--all").output


@pytest.mark.parametrize("text", BROKEN)
def test_a_damaged_file_is_forgotten(text):
    file = crossovers.crossover_file()
    file.parent.mkdir(parents=True)
    file.write_bytes(text.encode("latin-1"))
    result = run("tune", "--reset", "--all")
    assert result.exit_code == 0 and not file.exists()


def test_info_with_a_damaged_file(folders):
    crossovers.crossover_file().parent.mkdir(parents=True)
    crossovers.crossover_file().write_text("{")
    result = run("info", *folders)
    assert result.exit_code == 0
    assert result.output.count("cannot be read and is not used") == 1
    assert "Traceback" not in result.output


def test_tune_of_a_model_without_room_is_one_line(folders):
    result = run("tune", *folders[:-1], "5000")
    assert result.exit_code == 1
    assert "Error: --top-k must be at most half" in result.output
