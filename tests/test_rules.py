"""The seam of rules: by name, with options, from outside the package, and what is refused."""

import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from builders import make_indexers, make_model, make_tokens, rules_alone
from click.testing import CliRunner
from evals_subject import make_subject
from local_models import write_indexers, write_model
from mlx_lm.models.cache import make_prompt_cache

from mlx_dsa import SparseConfig, load_cache, patch_sparse_generate, plugins, registry, save_cache
from mlx_dsa.cli import main
from mlx_dsa.cli.eval.options import split_rules
from mlx_dsa.evals import make_policies, ppl
from mlx_dsa.evals.generation import take_rows
from mlx_dsa.rules import EvictRule, make_rule, register, rule_names
from mlx_dsa.rules.merging import Merging
from mlx_dsa.rules.snapkv import SnapKV
from mlx_dsa.saved import read_saved

DOCS = Path(__file__).resolve().parent.parent / "docs" / "rules.md"


def outside():
    """Register the rule that docs/rules.md shows."""
    code = re.search(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    exec(code, {"__name__": "outside"})


@pytest.fixture
def valuenorm():
    outside()
    yield "valuenorm"
    registry.forget("evict", "valuenorm")


def positions_kept(model, tokens, **config):
    with patch_sparse_generate(model, None, select="window", prefill="dense", **config) as patch:
        caches = make_prompt_cache(model)
        model(tokens, cache=caches)
        patch.prune(caches)
        return [np.array(c.positions) for c in caches], [np.array(c.values) for c in caches]


def test_a_rule_from_outside_the_package_is_asked(valuenorm):
    model, tokens = make_model(), make_tokens(60, batch=2)
    config = dict(top_k=20, n_sink=2, n_recent=4)
    _, values = positions_kept(model, tokens, **{**config, "top_k": 60}, evict="window")
    kept, _ = positions_kept(model, tokens, **config, evict="valuenorm:power=2")
    for layer, there in enumerate(kept):
        worth = (np.linalg.norm(values[layer], axis=-1) ** 2).mean(axis=1)
        for row in range(2):
            free = np.arange(2, 56)
            best = free[np.argsort(-worth[row, free])][:14]
            assert sorted(there[row]) == sorted([0, 1, *best, *range(56, 60)])
    newest, _ = positions_kept(model, tokens, **config, evict="window")
    assert any((a != b).any() for a, b in zip(kept, newest))


def test_a_rule_from_outside_is_saved_and_restored(valuenorm, tmp_path):
    model, tokens = make_model(), make_tokens(80)
    config = dict(top_k=20, n_sink=2, n_recent=4, select="window", evict="valuenorm:power=2")
    with patch_sparse_generate(model, None, **config) as patch:
        caches = make_prompt_cache(model)
        model(tokens[:, :60], cache=caches)
        file = save_cache(tmp_path / "it.kv", caches, patch)
        assert read_saved(file).config["evict"] == "valuenorm:power=2"
        loaded = load_cache(file, patch).caches
        for i in range(60, 80):
            there, here = (model(tokens[:, i : i + 1], cache=c) for c in (loaded, caches))
            assert mx.array_equal(there, here)
    with patch_sparse_generate(model, None, **{**config, "evict": "valuenorm"}) as patch:
        with pytest.raises(ValueError, match="made with evict = valuenorm:power=2 but the patch has valuenorm"):
            load_cache(file, patch)


def test_a_rule_from_outside_is_evaluated(valuenorm):
    subject = make_subject()
    spec = {"policy": "sparse", "evict": valuenorm, "select": "window", "top_k": 64, "n_recent": 16, "label": "it"}
    policies = make_policies(["dense", spec], SparseConfig(top_k=64, n_recent=16))
    result = ppl(subject, policies, length=200, path="decode", decode_tokens=8, limit=1)
    assert [r["policy"] for r in result["rows"]] == ["dense", "it"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("local")
    return str(write_model(root / "model")), str(write_indexers(root / "indexer"))


def generate(model, *options):
    arguments = ["generate", "--model", model, "--prompt", "a " * 100, "--max-tokens", "3", *options]
    return CliRunner().invoke(main, arguments)


def test_the_command_line_knows_a_rule_from_outside(valuenorm, folders):
    assert valuenorm in CliRunner().invoke(main, ["generate", "--help"]).output
    small = ("--top-k", "32", "--n-recent", "8")
    run = generate(folders[0], *small, "--select", "window", "--evict", "valuenorm:power=2")
    assert run.exit_code == 0, run.output
    run = generate(folders[0], *small, "--evict", "valuenorm")  # but lightning selects
    assert run.exit_code != 0 and "no indexers are known" in run.output


@pytest.mark.parametrize(
    "options, message",
    [
        (("--evict", "nope"), "'evict' must be one of"),
        (("--evict", "snapkv:pol=1"), "'snapkv' has no option 'pol': its options are by_head, pool"),
        (("--evict", "snapkv:pool"), "write pool=value"),
        (("--evict", "snapkv:pool=x"), "must be a whole number but got 'x'"),
        (("--evict", "window:a=1"), "has no option 'a': it has none"),
        (("--select", "oracle", "--cache", "tiered"), "keeps cold"),
        (("--select", "quest", "--evict", "index"), "what a rule of selecting keeps of them"),
        (("--evict", "keydiff:pool=-1"), "option 'pool' must be at least 0"),
        (("--evict", "ems:share=inf"), "option 'share' must be a number of at least 0"),
        (("--evict", "ems:base=keydiff:by_head=true"), "Leave by_head out"),
    ],
)
def test_what_is_wrong_with_a_rule_is_told_in_one_line(folders, options, message):
    run = generate(folders[0], "--indexer", folders[1], "--top-k", "80", *options)
    assert run.exit_code != 0 and "Traceback" not in run.output
    assert message in " ".join(run.output.split())


def test_a_rule_beside_dense_is_refused(folders):
    run = generate(folders[0], "--dense", "--select", "oracle")
    assert run.exit_code == 2 and "--select has no effect with --dense" in run.output


def test_info_tells_the_rules(folders):
    options = ["--model", folders[0], "--indexer", folders[1], "--top-k", "80", "--select", "oracle"]
    told = CliRunner().invoke(main, ["info", *options, "--evict", "snapkv:pool=2"]).output
    assert "select oracle, evict snapkv:pool=2" in " ".join(told.split())
    plain = CliRunner().invoke(main, ["info", *options[:-2]]).output
    assert "evict" not in plain and "select" not in plain


def test_names_are_taken_once():
    with pytest.raises(ValueError, match="has a rule 'keydiff' already"):
        register("evict", "keydiff")(EvictRule)
    assert "keydiff" in rule_names("evict") and make_rule("evict", "keydiff").pool == 4


def test_rules_without_indexers_want_none_and_others_say_so():
    model = make_model()
    missing = {"'lightning' and 'retention'": dict(), "'retention'": dict(select="window")}
    missing |= {"'lightning'": dict(evict="keydiff"), "'top_p'": dict(select="top_p", evict="window")}
    for which, rules in missing.items():
        with pytest.raises(ValueError, match=f"'indexers' must be given for {which}, which"):
            patch_sparse_generate(model, None, **rules)
    # Where nothing is evicted no rule of forgetting is asked.
    patch_sparse_generate(model, None, cache="full", select="quest").restore()


def test_a_rule_without_a_name_is_by_layer_and_stands_for_the_window():
    model = make_model()
    for rule, config in (
        (SnapKV(), {}),
        (SnapKV(by_head=True), dict(evict="window")),
        (Merging(), dict(evict="window")),
    ):
        with pytest.raises(ValueError, match="'evict_rule' stands in for evict='window'"):
            patch_sparse_generate(model, None, evict_rule=rule, select="window", **config)


def test_what_was_observed_and_taken_back_is_not_asked_for():
    model, tokens = make_model(), make_tokens(60)
    config = dict(select="window", evict="snapkv", top_k=20, n_sink=2, n_recent=4, observation_window=8)
    with patch_sparse_generate(model, None, prefill="dense", **config) as patch:
        caches = make_prompt_cache(model)
        model(tokens, cache=caches)
        for cache in caches:
            cache.trim(20)
        patch.prune(caches)
        assert all(sorted(np.array(c.positions)[0]) == [0, 1, *range(22, 40)] for c in caches)


def test_a_plugin_that_is_broken_is_told_and_the_others_run(monkeypatch):
    class Broken:
        value = "broken.rules"

        def load(self):
            raise ImportError("no module named broken")

    monkeypatch.setattr(plugins, "entry_points", lambda group: [Broken()])
    plugins.load_plugins.cache_clear()
    with pytest.warns(UserWarning, match="rules of broken.rules can't be loaded: no module named broken"):
        assert "keydiff" in rule_names("evict")
    assert "keydiff" in rule_names("evict")


def test_rules_in_a_list_keep_their_options():
    assert split_rules("dense, keydiff:pool=2,by_head=true,tova") == ["dense", "keydiff:pool=2,by_head=true", "tova"]


# Rules that read a file of another kind have tests of their own.
@pytest.mark.parametrize("select", rules_alone())
@pytest.mark.parametrize("prefill", ["exact", "tile", "dense"])
def test_every_rule_of_selecting_with_room_for_all_is_dense(select, prefill):
    model, tokens = make_model(), make_tokens(70)
    dense = model(tokens)
    select = {"sparsek": "sparsek:window=4"}.get(select, select)
    config = dict(cache="full", select=select, prefill=prefill, n_sink=2, n_recent=4, tile_size=8)
    for top_k, same in ((80, True), (24, prefill == "dense")):
        with patch_sparse_generate(model, make_indexers(model), top_k=top_k, **config):
            assert mx.array_equal(model(tokens, cache=make_prompt_cache(model)), dense) == same


@pytest.mark.parametrize("evict", rule_names("evict"))
@pytest.mark.filterwarnings("ignore:.*no retention head")
def test_every_rule_of_forgetting_gives_one_answer_however_a_prompt_is_cut(evict):
    # No token twice: in the first layer both would be worth the same, but for rounding.
    model, tokens = make_model(), mx.array(np.random.default_rng(0).permutation(101)[None, :90])
    config = dict(top_k=24, n_sink=2, n_recent=6, prefill="dense", evict=evict, observation_window=8)
    with patch_sparse_generate(model, make_indexers(model, retention_dim=8), **config) as patch:
        answers = []
        for cuts in ((70,), (30, 40), (7, 50, 13)):
            caches = make_prompt_cache(model)
            with patch.reading(caches):
                start = 0
                for n in cuts:
                    model(tokens[:, start : start + n], cache=caches)
                    start += n
            steps = [model(tokens[:, i : i + 1], cache=caches) for i in range(70, 90)]
            answers.append((mx.concatenate(steps, axis=1), [np.array(c.positions) for c in caches]))
            assert all(c.size() == 24 for c in caches)
    for logits, positions in answers[1:]:
        assert mx.allclose(logits, answers[0][0], atol=2e-4)
        assert all((np.sort(a) == np.sort(b)).all() for a, b in zip(positions, answers[0][1]))


def test_the_oracle_is_at_least_as_near_to_dense_as_any_other():
    model, tokens = make_model(), make_tokens(100)
    dense = model(tokens)
    far = {}
    for select in ("oracle", "window", "random"):
        config = dict(cache="full", select=select, prefill="exact", n_sink=1, n_recent=1, top_k=16)
        with patch_sparse_generate(model, None, evict="window", **config):
            far[select] = mx.abs(model(tokens, cache=make_prompt_cache(model)) - dense).mean().item()
    assert far["oracle"] == min(far.values()) and far["oracle"] < 0.9 * far["random"]


@pytest.mark.parametrize("evict", ["snapkv", "keydiff", "knorm"])
@pytest.mark.parametrize("prefill", ["dense", "stream"])
def test_heads_that_keep_their_own_answer_as_models_of_one_head(evict, prefill):
    """A model of two key heads by head keeps, for each, what a cache of that head alone would."""
    model, tokens = make_model(), mx.array(np.random.default_rng(1).permutation(101)[None, :90])
    tokens = mx.concatenate([tokens, tokens[:, ::-1]])
    config = dict(top_k=24, n_sink=2, n_recent=6, prefill=prefill, stream_chunk=32, select="window")
    kept, answers = {}, {}
    for by_head in ("true", "false"):
        rule = f"{evict}:by_head={by_head}"
        with patch_sparse_generate(model, None, evict=rule, **config) as patch:
            assert patch.config.prefill == prefill
            caches = make_prompt_cache(model)
            with patch.reading(caches):
                model(tokens[:, :70], cache=caches)
            kept[by_head] = np.sort(np.array(caches[0].positions))
            steps = [model(tokens[:, i : i + 1], cache=caches) for i in range(70, 90)]
            answers[by_head] = mx.concatenate(steps, axis=1)
            assert caches[0].keys.shape == ((4, 1, 24, 32) if by_head == "true" else (2, 2, 24, 32))
    assert kept["true"].shape == (4, 24) and kept["false"].shape == (2, 24)
    assert not (kept["true"][::2] == kept["true"][1::2]).all()  # heads differ
    assert not mx.allclose(answers["true"], answers["false"], atol=1e-3)
    # The rows of a batch answer as alone.
    with patch_sparse_generate(model, None, evict=f"{evict}:by_head=true", **config) as patch:
        caches = make_prompt_cache(model)
        with patch.reading(caches):
            model(tokens[1:, :70], cache=caches)
        steps = [model(tokens[1:, i : i + 1], cache=caches) for i in range(70, 90)]
        assert mx.allclose(mx.concatenate(steps, axis=1), answers["true"][1:], atol=2e-4)


def test_heads_that_keep_their_own_are_dense_with_room_for_all():
    model, tokens = make_model(), make_tokens(60, batch=2)
    dense = model(tokens)
    for top_k, same in ((64, True), (24, False)):
        config = dict(select="window", evict="snapkv:by_head=true", n_sink=2, n_recent=6)
        with patch_sparse_generate(model, None, top_k=top_k, **config) as patch:
            assert patch.config.prefill == "dense"
            caches = make_prompt_cache(model)
            parts = [model(tokens[:, :50], cache=caches)]
            parts += [model(tokens[:, i : i + 1], cache=caches) for i in range(50, 60)]
            assert mx.allclose(mx.concatenate(parts, axis=1), dense, atol=1e-4) == same


@pytest.mark.parametrize("n_steps", [0, 3])
def test_rows_of_texts_are_taken_with_all_their_heads(n_steps):
    model, tokens = make_model(), make_tokens(90, batch=3)
    config = dict(select="window", evict="snapkv:by_head=true", n_sink=2, n_recent=6, top_k=24)
    with patch_sparse_generate(model, None, **config):
        caches = make_prompt_cache(model)
        for start, stop in ((0, 60), *((i, i + 1) for i in range(60, 61 + n_steps))):
            model(tokens[:, start:stop], cache=caches)
        taken = take_rows(caches, [2, 0])
        for i in range(70, 80):
            there, here = (
                model(t[:, i : i + 1], cache=c) for t, c in ((tokens[mx.array([2, 0])], taken), (tokens, caches))
            )
            assert mx.allclose(there, here[mx.array([2, 0])], atol=1e-4)


@pytest.mark.parametrize("config", [dict(prefill="exact"), dict(cache="tiered")])
def test_where_heads_can_t_keep_their_own_is_told(config):
    with pytest.raises(ValueError, match="keeps entries by head"):
        SparseConfig(evict="snapkv:by_head=true", **config)
