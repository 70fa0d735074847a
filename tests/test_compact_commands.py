"""positions="compact" on the command line, in files, and in what evaluates."""

import json

import mlx.core as mx
import pytest
from builders import SHAPES, make_model, make_text, with_heads
from evals_subject import make_subject
from mlx_lm.models.cache import make_prompt_cache
from test_compress import TOLD, answer_of, ask, compress, options, refused, run
from test_compress import folder as folder
from test_evals_suites import NEEDLE

from mlx_dsa import BudgetKVCache, SparseConfig, load_cache, patch_sparse_generate, save_cache
from mlx_dsa import saved as saved_module
from mlx_dsa.evals import make_policies, make_policy, needle
from mlx_dsa.evals.generation import read
from mlx_dsa.evals.policies import NAMES
from mlx_dsa.saved import read_saved
from mlx_dsa.saved_before import AFTER, BUDGET_PLACES, NUMBERS, PLACES

COMPACT = ["--positions", "compact"]


@pytest.mark.parametrize(
    "way", [["--prefill", "exact"], ["--prefill", "stream", "--stream-chunk", 64]], ids=["once", "stream"]
)
def test_a_document_is_numbered_anew_and_asked(folder, tmp_path, way):
    file = tmp_path / "book.kv"
    result = compress(folder, file, *way, *COMPACT)
    assert result.exit_code == 0, result.output
    assert TOLD.search(result.output)[2] == "100"
    # What the file says is taken, and need not be said again.
    first = answer_of(ask(folder, file))
    assert first == answer_of(ask(folder, file, *COMPACT)) != ""
    refused(ask(folder, file, "--positions", "absolute"), 1, "--positions absolute", "made with compact")
    assert compress(folder, file, "--force", *way).exit_code == 0
    assert answer_of(ask(folder, file, "--positions", "absolute")) != first
    refused(ask(folder, file, *COMPACT), 1, "--positions compact", "made with absolute")


def test_chat_and_generate_take_it_and_say_it(folder):
    document = ["--file", folder / "book.txt", *options(folder)]
    for command, question in (("chat", ["--prompt", "How many sheep?"]), ("generate", [])):
        told = run(command, *document, *question, "--max-tokens", 12, *COMPACT)
        assert answer_of(told) and "100 entries kept" in told.output
        assert ("positions compact" in told.output) is (command == "chat")


def test_info_and_files_of_settings_name_it(folder, tmp_path):
    told = run("info", *options(folder), *COMPACT, "--prefill", "exact").output
    assert "prefill exact, positions compact, " in told
    assert "positions compact" not in run("info", *options(folder)).output
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"positions": "compact"}))
    assert "positions compact" in run("info", "--config", file).output
    assert "positions compact" not in run("info", "--config", file, "--positions", "absolute").output
    file.write_text(json.dumps({"positions": "near"}))
    refused(run("info", "--config", file), 1, "must be one of absolute, compact but got 'near'")


@pytest.mark.parametrize(
    "given, code, says",
    [
        (["--dense", *COMPACT], 2, "--positions has no effect with --dense"),
        (["--cache", "full", *COMPACT], 1, "for cache 'budget' only, not for 'full'"),
        (["--cache", "tiered", *COMPACT], 1, "for cache 'budget' only, not for 'tiered'"),
        (["--positions", "near"], 2, "'near' is not one of 'absolute', 'compact'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(given, code, says):
    refused(run("chat", "--prompt", "x", *given), code, says)


def test_bench_takes_it_but_not_to_train(folder, tmp_path):
    out = tmp_path / "bench.json"
    sizes = ["--contexts", 300, "--steps", 1, "--repeats", 1, "--out", out]
    result = run("bench", *options(folder), *COMPACT, *sizes)
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text())["config"]["positions"] == "compact"
    named = ["--model", folder / "model", "--contexts", 300]
    refused(run("bench", "--train", *named, *COMPACT), 2, "--positions has no effect with --train")


# Policies


BASE = SparseConfig(top_k=48, n_recent=8, prefill="exact", observation_window=8)
KEEP_ALL = ("full", "exact", "tile", "tiered")


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("dense", "kvzip", *KEEP_ALL)])
def test_every_policy_of_a_budget_takes_it(name):
    subject = make_subject(retention_dim=4)
    ids = mx.random.randint(0, 500, (1, 150), key=mx.random.key(3))
    marks = mx.zeros((1, 200)).at[:, 30:40].add(1)
    logits = {}
    for positions in ("absolute", "compact"):
        policy = make_policy({"policy": name, "positions": positions}, BASE)
        assert policy.config.positions == positions and policy.label == f"{name}@48"
        with policy.apply(subject, marks):
            caches = make_prompt_cache(subject.model)
            read(subject.model, ids, caches)
            steps = [subject.model(mx.full((1, 1), t), cache=caches) for t in range(20)]
            read(subject.model, ids[:, :30], caches)
            logits[positions] = mx.concatenate(steps, axis=1)
            shift = 200 - 48 if positions == "compact" else 0
            assert [c.shift for c in caches] == [shift] * len(caches)
            kept = set(caches[0].positions[0].tolist())
            assert len(kept) == 48 and (name != "kept" or set(range(30, 40)) <= kept)
    assert not mx.allclose(logits["absolute"], logits["compact"], atol=1e-2)


def test_policies_that_keep_all_keep_their_positions():
    compact = SparseConfig(**{**vars(BASE), "positions": "compact", "tile_size": 8})
    chosen = make_policies(["dense", *KEEP_ALL, "retention"], compact)
    found = {p.label: p.config and p.config.positions for p in chosen}
    assert found == {
        "dense": None, **{f"{n}@48": "absolute" for n in KEEP_ALL}, "retention@48": "compact"
    }  # fmt: skip
    for name in KEEP_ALL:
        with pytest.raises(ValueError, match=f"'{name}' is positions 'absolute' by itself but got 'compact'"):
            make_policy({"policy": name, "positions": "compact"}, BASE)
    with pytest.raises(ValueError, match="for cache 'budget' only"):
        make_policy({"policy": "sparse", "cache": "full", "positions": "compact"}, BASE)


def test_evaluations_take_it(tmp_path):
    few = ["--lengths", 200, "--depths", 1, "--limit", 1, "--top-k", 100, "--max-tokens", 2]
    out = tmp_path / "a.json"
    told = run("eval", "needle", *few, *COMPACT, "--policies", "dense,full,stream", "--out", out)
    assert told.exit_code == 0, told.output
    _, full, stream = json.loads(out.read_text())["config"]["policies"]
    assert (full["config"]["positions"], stream["config"]["positions"]) == ("absolute", "compact")
    refused(run("eval", "needle", *few, *COMPACT, "--policies", "dense,full"), 2, "--positions has no effect on")
    refused(run("eval", "needle", *few, *COMPACT, "--cache", "full"), 1, "for cache 'budget' only")
    policies = make_policies([{"policy": "retention", "positions": "compact", "label": "anew"}], BASE)
    own = {k: v for k, v in NEEDLE.items() if k not in ("name", "kind")}
    found = needle(make_subject(retention_dim=4), policies, **own)
    assert found["config"]["policies"][0]["config"]["positions"] == "compact" and found["items"]


def test_memory_is_computed_with_the_numbers(tmp_path):
    out = tmp_path / "a.json"
    given = ["--lengths", 256, "--top-k", 64, "--policies", "retention", "--out", out]
    values = {}
    for positions in ("absolute", "compact"):
        assert run("eval", "memory", *given, "--positions", positions).exit_code == 0
        (row,) = json.loads(out.read_text())["rows"]
        values[positions] = row["value"], row["computed"]
        out.unlink()
    n_layers = len(row["entries"])
    before, after = values["absolute"], values["compact"]
    assert after[0] - before[0] == after[1] - before[1] == n_layers * 64 * 4


# Files from before


def by_place(held, names):
    """Return contents as versions wrote them that knew no names, and no retention without a head."""
    names = [n for n in names if n != "scores" or held[n] is not None]
    return {str(i): held[n] for i, n in enumerate(names)}


def as_before(monkeypatch):
    """Save as versions did that knew no numbers."""
    contents = BudgetKVCache.contents
    monkeypatch.setattr(saved_module, "_FORMAT", "mlx-dsa cache 3")
    monkeypatch.setattr(saved_module, "_contents_of", lambda c: by_place(contents.fget(c), (*BUDGET_PLACES, *AFTER)))
    fields = saved_module.dataclasses.asdict
    monkeypatch.setattr(
        saved_module.dataclasses, "asdict",
        lambda c: {k: v for k, v in fields(c).items() if k != "positions"},
    )  # fmt: skip


@pytest.mark.parametrize("evict", ["retention", "index"])
@pytest.mark.parametrize("n_steps", [0, 3])
def test_files_from_before_go_on_with_absolute_positions(tmp_path, monkeypatch, evict, n_steps):
    model = make_model(**SHAPES["gqa2"], vocab=1024)
    indexers, tokens = with_heads(model), make_text(150)
    rules = dict(top_k=24, n_sink=3, n_recent=5, observation_window=8, evict=evict)
    with patch_sparse_generate(model, indexers, **rules) as patch:
        cache = make_prompt_cache(model)
        model(tokens[:, :90], cache=cache)
        for i in range(n_steps):
            model(tokens[:, 90 + i : 91 + i], cache=cache)
        with monkeypatch.context() as then:
            as_before(then)
            path = save_cache(tmp_path / "old.kv", cache, patch)
        now = save_cache(tmp_path / "new.kv", cache, patch)
        assert b'"mlx-dsa cache 3"' in path.read_bytes() and b'"mlx-dsa cache 6"' in now.read_bytes()
        assert path.read_bytes().count(b"positions") < now.read_bytes().count(b"positions")
        for file in (path, now):
            assert read_saved(file).config["positions"] == "absolute"
            loaded = load_cache(file, patch).caches
            for i in range(100, 130):
                expected = model(tokens[:, i : i + 1], cache=loaded)
            if file == path:
                first = expected
        assert mx.array_equal(first, expected)
    with patch_sparse_generate(model, indexers, **rules, positions="compact") as patch:
        with pytest.raises(ValueError, match="made with positions = absolute but the patch has compact"):
            load_cache(path, patch)


@pytest.mark.parametrize("n_steps", [0, 3])
def test_files_from_before_that_hold_unrotated_keys_go_on(tmp_path, monkeypatch, n_steps):
    model = make_model(**SHAPES["gqa2"], vocab=1024)
    model.set_dtype(mx.float16)
    tokens = make_text(200)
    rules = dict(top_k=24, n_sink=3, n_recent=5, positions="compact", prefill="dense")
    contents = BudgetKVCache.contents

    def as_then(cache, turn, keeps=True):
        held = contents.fget(cache)
        keys, numbers = held["first_keys"], held["first_numbers"]
        held["first_keys"] = turn(keys, -numbers) if keeps else mx.zeros_like(keys)
        return by_place(held, (*BUDGET_PLACES, *NUMBERS[:4], *AFTER))

    with patch_sparse_generate(model, with_heads(model), **rules) as patch:
        cache = make_prompt_cache(model)
        model(tokens[:, :90], cache=cache)
        patch.prune(cache)
        for i in range(90, 90 + n_steps):
            model(tokens[:, i : i + 1], cache=cache)
        files = {"now": save_cache(tmp_path / "now.kv", cache, patch)}
        turn = patch.layers[0].layer.turn
        for name, keeps in (("then", True), ("lost", False)):
            with monkeypatch.context() as then:
                then.setattr(saved_module, "_FORMAT", "mlx-dsa cache 4")
                then.setattr(saved_module, "_contents_of", lambda c: as_then(c, turn, keeps))
                files[name] = save_cache(tmp_path / f"{name}.kv", cache, patch)
        logits = {}
        for name, file in files.items():
            loaded = load_cache(file, patch).caches
            for i in range(100, 130):  # numbered anew several times
                logits[name] = model(tokens[:, i : i + 1], cache=loaded)
    assert mx.allclose(logits["then"], logits["now"], atol=0.02)
    assert not mx.allclose(logits["lost"], logits["now"], atol=0.02)


@pytest.mark.parametrize("cache", ["budget", "full"])
@pytest.mark.parametrize("positions", ["absolute", "compact"])
@pytest.mark.parametrize("evict", ["retention", "index"])
def test_files_from_before_that_know_no_names_go_on(tmp_path, monkeypatch, cache, positions, evict):
    if cache == "full" and positions == "compact":
        return
    model = make_model(**SHAPES["gqa2"], vocab=1024)
    tokens = make_text(200)
    rules = dict(top_k=24, n_sink=3, n_recent=5, positions=positions, cache=cache, evict=evict, prefill="dense")
    names = PLACES if cache == "full" else (*BUDGET_PLACES, *NUMBERS, *AFTER)
    contents = saved_module._contents_of

    def as_then(c):
        held = contents(c)
        return by_place(held, names if "prompt" in held else ("keys", "values", "offset"))

    # A layer that is left dense has mlx-lm's own cache.
    indexers = {1: with_heads(model)[1]}
    with patch_sparse_generate(model, indexers, **rules) as patch:
        caches = make_prompt_cache(model)
        model(tokens[:, :90], cache=caches)
        for i in range(90, 93):
            model(tokens[:, i : i + 1], cache=caches)
        files = [save_cache(tmp_path / "now.kv", caches, patch)]
        with monkeypatch.context() as then:
            then.setattr(saved_module, "_FORMAT", "mlx-dsa cache 5")
            then.setattr(saved_module, "_contents_of", as_then)
            files.append(save_cache(tmp_path / "then.kv", caches, patch))
        logits = []
        for file in files:
            loaded = load_cache(file, patch).caches
            logits.append(mx.concatenate([model(tokens[:, i : i + 1], cache=loaded) for i in range(93, 120)], axis=1))
        assert mx.array_equal(*logits)
