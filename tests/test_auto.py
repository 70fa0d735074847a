"""prefill "auto": a stream for a compact budget whose layers all have heads, and for no other."""

import json

import mlx.core as mx
import pytest
from builders import SHAPES, SMALL_RULES, make_indexers, make_model, make_text, with_heads
from evals_subject import make_subject
from local_models import write_indexers
from mlx_lm.models.cache import make_prompt_cache
from test_compress import TOLD, answer_of, ask, compress, options, refused, run
from test_compress import folder as folder
from test_evals_suites import NEEDLE
from test_presets import no_hub as no_hub

from mlx_dsa import SparseConfig, load_cache, patch_sparse_generate, save_cache
from mlx_dsa import saved as saved_module
from mlx_dsa.config import override
from mlx_dsa.crossovers import resolve_auto
from mlx_dsa.evals import make_policies, needle
from mlx_dsa.presets import heads_of, preset_names, resolve, resolve_auto_of
from mlx_dsa.reach import reach_of, reach_with
from mlx_dsa.saved import read_saved

RULES = dict(SMALL_RULES, observation_window=8, stream_chunk=16, tile_size=8)
COMPACT = ["--positions", "compact"]
PRESET = "qwen2.5-coder-0.5b"


@pytest.fixture(scope="module")
def small():
    model = make_model(**SHAPES["gqa2"], vocab=1024)
    return model, with_heads(model)


@pytest.fixture(scope="module")
def headless(folder):
    """Indexers without retention heads beside the others."""
    mx.random.seed(0)
    write_indexers(folder / "headless")
    return "headless"


def logits_of(model, indexers, **config):
    with patch_sparse_generate(model, indexers, **{**RULES, **config}) as patch:
        cache = make_prompt_cache(model)
        calls = mx.split(make_text(100), [90, 99], axis=1)
        outputs = [model(call, cache=cache)[:, -1] for call in calls]
        kept = cache[0].positions[0].tolist() if patch.config.cache == "budget" else None
        return mx.stack(outputs), kept


# Where it is a stream


def test_it_streams_a_compact_budget(small):
    model, indexers = small
    with patch_sparse_generate(model, indexers, **RULES, positions="compact") as patch:
        assert patch.config == SparseConfig(**RULES, positions="compact", prefill="stream")
        assert {layer.prefill for layer in patch.layers.values()} == {"stream"}
        assert reach_of(model).is_bounded
    config = SparseConfig(**RULES, positions="compact")
    assert reach_with(model, indexers, config).is_bounded
    auto, stream, once = (
        logits_of(model, indexers, positions="compact", prefill=way) for way in ("auto", "stream", "exact")
    )
    assert mx.array_equal(auto[0], stream[0]) and auto[1] == stream[1]
    assert not mx.allclose(auto[0], once[0], atol=1e-2)


@pytest.mark.parametrize(
    "changes",
    [
        {"positions": "absolute"},
        {"positions": "absolute", "cache": "full"},
        {"positions": "absolute", "cache": "tiered"},
        *({"evict": evict} for evict in ("blend", "keydiff", "index", "window")),
        *({"prefill": prefill} for prefill in ("dense", "exact", "tile")),
    ],
    ids=str,
)
def test_it_streams_nothing_else(small, changes):
    model, indexers = small
    given = {**RULES, "positions": "compact", **changes}
    with patch_sparse_generate(model, indexers, **given) as patch:
        assert patch.config == SparseConfig(**given)
        assert "stream" not in {layer.prefill for layer in patch.layers.values()}
        assert not reach_of(model).is_bounded
    assert not reach_with(model, indexers, SparseConfig(**given)).is_bounded


def test_every_sparse_layer_needs_a_head(small):
    model, indexers = small
    some = {**indexers, 1: make_indexers(model)[1]}
    config = SparseConfig(**RULES, positions="compact")
    assert resolve_auto(config, indexers).prefill == "stream"
    assert resolve_auto(config, some) == config == resolve_auto(config, {})
    with pytest.warns(UserWarning, match="no retention head"):
        with patch_sparse_generate(model, some, **vars(config)) as patch:
            assert patch.config.prefill == "auto" and not reach_of(model).is_bounded
    # A layer that is left dense needs none.
    left = SparseConfig(**RULES, positions="compact", dense_layers=(1,))
    assert resolve_auto(left, some).prefill == "stream"
    del some[1]
    assert resolve_auto(config, some).prefill == "stream"


# What is saved


def test_a_cache_loads_with_the_settings_that_made_it(small, tmp_path):
    model, indexers = small
    given = {**RULES, "positions": "compact"}
    with patch_sparse_generate(model, indexers, **given) as patch:
        cache = make_prompt_cache(model)
        model(make_text(100), cache=cache)
        path = save_cache(tmp_path / "a.kv", cache, patch)
        assert load_cache(path, patch).tokens == 100
    assert read_saved(path).config["prefill"] == "stream"
    with patch_sparse_generate(model, indexers, **given, prefill="stream") as patch:
        assert load_cache(path, patch).tokens == 100
    for other, named in (({"prefill": "exact"}, "exact"), ({"stream_chunk": 32}, "16")):
        with patch_sparse_generate(model, indexers, **{**given, **other}) as patch:
            with pytest.raises(ValueError, match=f"the patch has .*{named[-1]}"):
                load_cache(path, patch)


def test_a_file_from_before_says_how_to_read_it(small, tmp_path, monkeypatch):
    model, indexers = small
    given = {**RULES, "positions": "compact"}
    with patch_sparse_generate(model, indexers, **given, prefill="exact") as patch:
        cache = make_prompt_cache(model)
        model(make_text(100), cache=cache)
        fields = saved_module.dataclasses.asdict
        with monkeypatch.context() as then:
            then.setattr(
                saved_module.dataclasses, "asdict",
                lambda c: {**fields(c), **({"prefill": "auto"} if c is patch.config else {})},
            )  # fmt: skip
            path = save_cache(tmp_path / "old.kv", cache, patch)
        assert read_saved(path).config["prefill"] == "auto"
        assert load_cache(path, patch).tokens == 100
    with patch_sparse_generate(model, indexers, **given) as patch:
        with pytest.raises(ValueError, match="Set prefill to tile, exact or dense"):
            load_cache(path, patch)


def test_a_document_is_streamed_and_asked(folder, headless, tmp_path):
    file, other = tmp_path / "a.kv", tmp_path / "b.kv"
    ways = [*COMPACT, "--stream-chunk", 64]
    # Only what streams has a part file.
    result = compress(folder, file, *ways, "--save-every", 0)
    assert result.exit_code == 0 and TOLD.search(result.output)[2] == "100", result.output
    assert compress(folder, other, *ways, "--prefill", "stream").exit_code == 0
    assert file.read_bytes() == other.read_bytes()
    first = answer_of(ask(folder, file))
    for same in (ways, [*ways, "--prefill", "auto"], ["--prefill", "auto"], ["--prefill", "stream"]):
        assert answer_of(ask(folder, file, *same)) == first != ""
    refused(ask(folder, file, "--prefill", "exact"), 1, "--prefill exact", "made with stream")
    refused(ask(folder, file, *COMPACT, "--stream-chunk", 32), 1, "--stream-chunk 32", "made with 64")
    # What was streamed by name alone is not what auto makes.
    assert compress(folder, other, "--force", "--prefill", "stream").exit_code == 0
    refused(ask(folder, other, "--prefill", "auto"), 1, "--prefill auto", "made with stream")
    assert answer_of(ask(folder, other))
    once = compress(folder, other, "--force", *COMPACT, "--prefill", "exact")
    assert once.exit_code == 0 and read_saved(other).config["prefill"] == "exact"
    assert answer_of(ask(folder, other))


@pytest.mark.parametrize("given", [["--save-every", 0], ["--stream-chunk", 64]], ids=str)
def test_options_of_a_stream_are_refused_without_one(folder, headless, tmp_path, given):
    document = ["compress", folder / "book.txt", "--out", tmp_path / "a.kv"]
    says = "has no effect without --prefill stream"
    refused(run(*document, *options(folder), *given), 2, says)
    refused(run(*document, *options(folder, indexer=headless), *COMPACT, *given), 2, says)
    refused(run(*document, *options(folder), *COMPACT, "--prefill", "exact", *given), 2, says)


# What is told and recorded


def test_info_tells_what_it_takes(folder, headless):
    told = run("info", *options(folder), *COMPACT).output
    assert "prefill stream (a cut every 2048), positions compact" in told
    assert "Tuned     not needed: prefill auto is stream" in told
    for given in (
        [*options(folder), *COMPACT, "--prefill", "stream"],
        options(folder),
        [*options(folder, indexer=headless), *COMPACT],
    ):
        assert "not needed" not in run("info", *given).output
    assert "prefill auto" in run("info", *options(folder)).output
    assert "prefill auto, positions compact" in run("info", *options(folder, indexer=headless), *COMPACT).output
    told = run("info", "--preset", PRESET).output
    assert "prefill stream (a cut every 2048), positions compact" in told and "512 recent" in told


def test_info_fetches_nothing_to_know(no_hub):
    told = run("info", "--preset", "qwen3-8b", *COMPACT, "--stream-chunk", 64)
    assert told.exit_code == 0 and "prefill auto, positions compact" in told.output
    assert heads_of(resolve("qwen3-8b"), download=False) is None
    with pytest.raises(FileNotFoundError):
        heads_of(resolve("qwen3-8b"))


def test_chat_and_bench_say_it(folder, tmp_path):
    told = run(
        "chat", "--file", folder / "book.txt", *options(folder), *COMPACT, "--prompt", "Sheep?", "--max-tokens", 4
    )
    assert answer_of(told) and "prefill stream (a cut every 2048)" in told.output
    sizes = ["--contexts", 300, "--steps", 1, "--repeats", 1, "--alone", "--out", tmp_path / "a.json"]
    for given, mode in ((COMPACT, "stream"), ([*COMPACT, "--prefill", "exact"], "exact")):
        result = run("bench", *options(folder), *sizes, *given, "--stream-chunk", 64)
        if mode == "exact":
            refused(result, 2, "--stream-chunk has no effect")
            result = run("bench", *options(folder), *sizes, *given)
        assert result.exit_code == 0, result.output
        said = json.loads((tmp_path / "a.json").read_text())
        assert said["rows"][0]["prefill"]["mode"] == mode == said["config"]["prefill"]


@pytest.mark.filterwarnings("ignore:.*no retention head:UserWarning")
def test_evaluations_record_it_policy_by_policy(folder, headless, tmp_path):
    base = SparseConfig(top_k=48, n_recent=8, tile_size=8, positions="compact", stream_chunk=32)
    policies = make_policies(["dense", "sparse", "keydiff", "full", "window"], base)
    own = {k: v for k, v in NEEDLE.items() if k not in ("name", "kind")}
    for heads, streams in ((4, "stream"), (0, "auto")):
        found = needle(make_subject(retention_dim=heads), policies, **own)
        ways = [p["config"] and p["config"]["prefill"] for p in found["config"]["policies"]]
        assert ways == [None, streams, "auto", "auto", "auto"]
    few = ["--lengths", 200, "--depths", 1, "--limit", 1, "--max-tokens", 2, "--out", tmp_path / "a.json"]
    given = ["eval", "needle", *few, *COMPACT, "--stream-chunk", 64, "--policies", "sparse", "--compare", "sparse"]
    assert run(*given, *options(folder)).exit_code == 0
    (said,) = json.loads((tmp_path / "a.json").read_text())["config"]["policies"]
    assert said["config"]["prefill"] == "stream"
    refused(run(*given, *options(folder, indexer=headless)), 2, "--stream-chunk has no effect on sparse")


# The preset that has it, and the way out


def test_one_preset_streams():
    ways = {name: resolve_auto_of(resolve(name), download=False).config.prefill for name in preset_names()}
    assert {name for name, way in ways.items() if way == "stream"} == {PRESET}
    config = resolve(PRESET).config
    assert (config.positions, config.n_recent, config.prefill) == ("compact", 512, "auto")


@pytest.mark.parametrize("cache", ["full", "tiered"])
def test_a_cache_that_keeps_all_is_enough_to_say(tmp_path, cache):
    assert resolve(PRESET, cache=cache).config.positions == "absolute"
    assert resolve(PRESET, cache="budget").config.positions == "compact"
    with pytest.raises(ValueError, match="for cache 'budget' only"):
        resolve(PRESET, cache=cache, positions="compact")
    told = run("info", "--preset", PRESET, "--cache", cache)
    assert told.exit_code == 0 and "prefill auto, 4 sinks, 512 recent" in told.output, told.output
    refused(run("info", "--preset", PRESET, "--cache", cache, *COMPACT), 1, "for cache 'budget' only")
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"cache": cache}))
    told = run("info", "--preset", PRESET, "--config", file)
    assert told.exit_code == 0 and f"cache {cache}, prefill auto, 4 sinks" in told.output
    file.write_text(json.dumps({"cache": cache, "positions": "compact"}))
    refused(run("info", "--preset", PRESET, "--config", file), 1, "for cache 'budget' only")
    # What a file says of a budget is passed over, too.
    file.write_text(json.dumps({"positions": "compact"}))
    assert run("info", "--config", file, "--cache", cache).exit_code == 0
    assert override({"positions": "compact"}, {"cache": cache})["positions"] == "absolute"
    assert "positions" not in override({}, {"cache": cache})
    assert make_policies([{"policy": "sparse", "cache": cache}], resolve(PRESET).config)[0].config.cache == cache


@pytest.mark.parametrize("prefill", ["dense", "tile", "exact"])
def test_the_preset_reads_otherwise_if_told_to(prefill):
    told = run("info", "--preset", PRESET, "--prefill", prefill).output
    assert f"prefill {prefill}, positions compact" in told


def test_a_demo_keeps_all_beside_a_compact_budget(folder):
    told = run("demo", "--prompt", "How many sheep?", *options(folder), *COMPACT)
    assert told.exit_code == 0, told.output
    assert "prefill stream" in told.output and "sparse, all kept" in told.output


def test_every_command_takes_the_way_out(folder, tmp_path):
    named = ["--preset", PRESET, *options(folder), "--cache", "full"]
    few = ["--max-tokens", 2]
    assert answer_of(run("chat", "--prompt", "How many?", *few, *named))
    assert answer_of(run("generate", "--file", folder / "book.txt", *few, *named))
    assert run("compress", folder / "book.txt", "--out", tmp_path / "a.kv", *named).exit_code == 0
    out = tmp_path / "a.json"
    sizes = ["--contexts", 200, "--steps", 1, "--repeats", 1, "--alone", "--out", out]
    assert run("bench", *named, *sizes).exit_code == 0
    said = json.loads(out.read_text())["config"]
    assert (said["cache"], said["positions"], said["prefill"]) == ("full", "absolute", "auto")
    out.unlink()
    lengths = ["--lengths", 200, "--depths", 1, "--limit", 1, "--policies", "sparse", "--compare", "sparse"]
    told = run("eval", "needle", *named, *lengths, *few, "--out", out)
    assert told.exit_code == 0, told.output
    (policy,) = json.loads(out.read_text())["config"]["policies"]
    assert (policy["config"]["cache"], policy["config"]["positions"]) == ("full", "absolute")
