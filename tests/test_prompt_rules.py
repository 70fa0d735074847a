"""The papers' ways to read a prompt against NumPy, in prompts by query and by tile, and in decode."""

import sys

import mlx.core as mx
import numpy as np
import pytest
from builders import SMALL_RULES, feed_layer, layer_of, make_model
from click.testing import CliRunner
from local_models import write_model
from simulate import MARGIN, whole_calls
from test_select_rules import integers, layer_sets, numpy_sets, select

from mlx_dsa import SparseConfig, patch_sparse_generate
from mlx_dsa.cli import main
from mlx_dsa.rules import make_rule
from mlx_dsa.rules.hip import Hip
from numpy_reference import prompt_rules as expected
from numpy_reference.rules import attention

SCALE = 32**-0.5  # of the small model
TILES = dict(SMALL_RULES, top_k=40, tile_size=16)


def run_layer(model, x, calls, select, **rules):
    """Return what a patched layer answers to hidden states `[L, dim]` in these calls."""
    rules = {**SMALL_RULES, "cache": "full", "prefill": "exact", "evict": "window", "select": select, **rules}
    with patch_sparse_generate(model, None, **rules) as patch:
        return feed_layer(patch, x, calls)[0]


def clear_case(make, find, length):
    """Return hidden states for which `find(x)` leaves no doubt, and its answer."""
    for seed in range(200):
        x = np.random.default_rng(seed).standard_normal((length, 64)) * make
        theirs, margin = find(x)
        if margin > MARGIN:
            return x, theirs
    raise AssertionError("no seed is clear")


def tiles_of(model, x, make, one):
    """Return the output of tiles by NumPy, and the margin: of `make(queries, keys)` for a tile, and
    `one(query, keys)` for a tile of one query."""
    layer = layer_of(model)
    queries, keys, values, _ = layer.project(mx.array(x[None].astype(np.float32)), 0)
    q, k, v = (np.array(a[0]).astype(np.float64) for a in (queries, keys, values))
    sets, margin, size = [], 1.0, TILES["tile_size"]
    for start in range(0, len(x), size):
        stop = min(start + size, len(x))
        if stop <= TILES["top_k"]:
            sets += [set(range(t + 1)) for t in range(start, stop)]
            continue
        if stop - start == 1:
            chosen, m = one(q[:, start], k[:, :stop])
            sets.append(chosen)
        else:
            shared, m = make(q[:, start:stop], k[:, :stop])
            sets += [shared | set(range(start, t + 1)) for t in range(start, stop)]
        margin = min(margin, m)
    out = mx.array(attention(q, k, v, [sets] * len(k), layer.scale)[None].astype(np.float32))
    return np.array(layer.output(out, None)[0]), margin


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("local") / "model"))


# rule -> its form for a query, and for a tile; a wrong rule beside it.
FORMS = {
    "anchor:theta=1.5": (
        lambda q, k, h, r: expected.anchor(q, k, r, SCALE, 1.5, h),
        lambda q, k: expected.anchor_tile(q, k, TILES, SCALE, 1.5),
        "anchor:theta=0.8",
    ),
    "anchor:theta=1.5,by_head=true": (
        lambda q, k, h, r: expected.anchor(q, k, r, SCALE, 1.5, h),
        lambda q, k: expected.anchor_tile(q, k, TILES, SCALE, 1.5),
        "anchor:theta=0.8",
    ),
    "anchor": (
        lambda q, k, h, r: expected.anchor(q, k, r, SCALE, 12, h),
        lambda q, k: expected.anchor_tile(q, k, TILES, SCALE, 12),
        "anchor:theta=0.8",
    ),
    "s2o:tau=0.2,block=3": (
        lambda q, k, h, r: expected.s2o(q, k, r, SCALE, 0.2, 3, h),
        lambda q, k: expected.s2o_tile(q, k, TILES, SCALE, 0.2, 3),
        "s2o:tau=0.25,block=3",
    ),
    "s2o:tau=0.2,block=4,by_head=true": (
        lambda q, k, h, r: expected.s2o(q, k, r, SCALE, 0.2, 4, h),
        lambda q, k: expected.s2o_tile(q, k, TILES, SCALE, 0.2, 4),
        "s2o:tau=0.2,block=3",
    ),
    "dhsa:window=2,apart=2": (
        lambda q, k, h, r: expected.dhsa(q, k, r, 2, 2),
        lambda q, k: expected.dhsa_tile(q, k, TILES, 2, 2),
        "dhsa:window=2,apart=3",
    ),
    "dhsa": (
        lambda q, k, h, r: expected.dhsa(q, k, r, 4, 8),
        lambda q, k: expected.dhsa_tile(q, k, TILES, 4, 8),
        "dhsa:window=3",
    ),
    "hip": (
        lambda q, k, h, r: expected.hip(q, k, r, 1, h),
        lambda q, k: expected.hip_tile(q, k, TILES, 1),
        "sparsek:window=0,stride=0",
    ),
    "hip:block=3,by_head=true": (
        lambda q, k, h, r: expected.hip(q, k, r, 3, h),
        lambda q, k: expected.hip_tile(q, k, TILES, 3),
        "hip:block=4",
    ),
}


@pytest.mark.parametrize("text", FORMS)
def test_a_layer_attends_to_what_numpy_selects(text):
    """In prompts and in decode, wherever a text is cut."""
    model = make_model(layers=1)
    form, _, wrong = FORMS[text]

    def find(x):
        return layer_sets(model, x, lambda q, k, h: form(q, k, h, SMALL_RULES), "by_head" in text)

    x, theirs = clear_case(1.0, find, 70)
    for calls in ([70], whole_calls(70, 33), [31, 1, 30] + [1] * 8, [1] * 70):
        assert np.abs(run_layer(model, x, calls, text) - theirs).max() < 1e-5
    assert np.abs(run_layer(model, x, [70], wrong) - theirs).max() > 1e-3


@pytest.mark.parametrize("text", FORMS)
def test_a_layer_attends_by_tile_to_what_numpy_selects(text):
    """And calls of whole tiles give the same. A call that ends inside a tile makes a tile of its own."""
    model = make_model(layers=1)
    form, tile, wrong = FORMS[text]

    def find(x):
        return tiles_of(model, x, tile, lambda q, k: form(q, k, None, TILES))

    x, theirs = clear_case(1.0, find, 91)
    for calls in ([91], [48, 43], [16] * 5 + [11]):
        ours = run_layer(model, x, calls, text, **dict(TILES, prefill="tile"))
        assert np.abs(ours - theirs).max() < 1e-5
    other = run_layer(model, x, [91], wrong, **dict(TILES, prefill="tile"))
    assert np.abs(other - theirs).max() > 1e-3


@pytest.mark.parametrize("n_visible", [range(25, 91), [90], [90, 90, 40]])
@pytest.mark.parametrize("theta", [0, 2, 12])
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (2, 2), (3, 1)])
def test_anchor_reads_what_falls_short_by_little(heads, kv_heads, theta, n_visible):
    queries, keys = integers(heads=heads, kv_heads=kv_heads, seed=4)
    scale = float(layer_of(make_model()).scale)

    def make(q, k, some):
        return expected.anchor(q, k, SMALL_RULES, scale, theta + 0.01, some)

    text = f"anchor:theta={theta + 0.01}"
    ours = select(text, queries, keys, n_visible)[0]
    assert ours == numpy_sets(make, queries, keys, n_visible)
    by_head = select(f"{text},by_head=true", queries, keys, n_visible)[0]
    theirs = [numpy_sets(make, queries, keys, n_visible, [h]) for h in range(kv_heads)]
    assert by_head == [list(of_heads) for of_heads in zip(*theirs)]
    sizes = {len(s) for row in ours for s in row}
    if theta == 12:
        assert sizes == {24}
    if theta == 0 and len(n_visible) > 3:  # a dynamic budget: from the forced ones on
        assert len(sizes) > 5 and min(sizes) < 14


@pytest.mark.parametrize("n_visible", [range(25, 91), [90], [90, 90, 40]])
@pytest.mark.parametrize("block", [1, 2, 5, 16, 40])
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (2, 2), (3, 1)])
def test_hip_reads_what_a_tree_search_finds(heads, kv_heads, block, n_visible):
    queries, keys = integers(heads=heads, kv_heads=kv_heads, seed=5)

    def make(q, k, some):
        return expected.hip(q, k, SMALL_RULES, block, some)

    ours = select(f"hip:block={block}", queries, keys, n_visible)[0]
    assert ours == numpy_sets(make, queries, keys, n_visible)
    by_head = select(f"hip:block={block},by_head=true", queries, keys, n_visible)[0]
    theirs = [numpy_sets(make, queries, keys, n_visible, [h]) for h in range(kv_heads)]
    assert by_head == [list(of_heads) for of_heads in zip(*theirs)]
    # It is a search: the best keys are missed where they hide behind others, and it fills top_k.
    best = select("sparsek:window=0,stride=0", queries, keys, n_visible)[0]
    assert ours != best
    if block == 1:
        assert {len(s) for row in ours for s in row} == {24}


def test_hip_looks_at_few_keys(monkeypatch):
    """As many representatives a level as it keeps, twice, whatever the length of the text."""
    looked = []
    scores = Hip._scores
    monkeypatch.setattr(Hip, "_scores", lambda self, q, k, s: looked.append(s.shape[-1]) or scores(self, q, k, s))
    counts = []
    for length in (100, 1600):
        queries, keys = integers(B=1, heads=2, kv_heads=2, length=length)
        looked.clear()
        select("hip", queries, keys, [length])
        assert set(looked) == {32}  # 16 nodes, halved
        counts.append(len(looked))
    assert counts == [3, 7]  # halvings of a node of 6, of 100


@pytest.mark.parametrize("n_visible", [range(25, 91), [90], [90, 90, 40]])
@pytest.mark.parametrize("tau, block", [(0, 5), (0.1001, 1), (0.3001, 4), (0.9, 64)])
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (2, 2), (3, 1)])
def test_s2o_reads_until_a_block_adds_little(heads, kv_heads, tau, block, n_visible):
    queries, keys = integers(heads=heads, kv_heads=kv_heads, seed=6)
    scale = float(layer_of(make_model()).scale)

    def make(q, k, some):
        return expected.s2o(q, k, SMALL_RULES, scale, tau, block, some)

    text = f"s2o:tau={tau},block={block}"
    ours = select(text, queries, keys, n_visible)[0]
    assert ours == numpy_sets(make, queries, keys, n_visible)
    by_head = select(f"{text},by_head=true", queries, keys, n_visible)[0]
    theirs = [numpy_sets(make, queries, keys, n_visible, [h]) for h in range(kv_heads)]
    assert by_head == [list(of_heads) for of_heads in zip(*theirs)]
    sizes = {len(s) for row in ours for s in row}
    if not tau or block == 64:  # nothing stops, or one block is all
        assert sizes == {24}
        if not tau:
            assert ours == select("sparsek:window=0,stride=0", queries, keys, n_visible)[0]
    elif len(n_visible) > 3:
        assert len(sizes) > 2 and max(sizes) <= 24


def runs(lengths, seed=0):
    """Return keys `[1, 2, T, 8]` of one direction a run, and where runs begin."""
    draw = np.random.default_rng(seed)
    keys = [draw.standard_normal((2, 1, 8)) + 0.3 * draw.standard_normal((2, n, 8)) for n in lengths]
    return np.concatenate(keys, axis=1)[None].astype(np.float32), np.cumsum([0, *lengths])[:-1]


def test_dhsa_cuts_where_the_content_changes():
    lengths = [9, 17, 6, 30, 12, 7, 20, 11]
    keys, begins = runs(lengths)
    rule = make_rule("select", "dhsa:window=3,apart=3").bind(layer_of(make_model()))
    found = np.flatnonzero(np.array(rule.boundaries(mx.array(keys))[0]))
    assert set(begins[1:]) <= set(found) and set(found) == set(expected.chunks(keys[0], 3, 3)[0][1:])
    # What stands `apart + window` after a place, or later, is not looked at.
    changed = keys.copy()
    changed[:, :, 60:] = 9 - changed[:, :, 60:]
    again = np.flatnonzero(np.array(rule.boundaries(mx.array(changed))[0]))
    assert again[again <= 54].tolist() == found[found <= 54].tolist() and again.tolist() != found.tolist()


def test_dhsa_weighs_chunks_by_the_root_of_their_length():
    keys, _ = runs([9, 17, 6, 30, 12, 7, 20, 11], seed=3)
    queries = np.random.default_rng(9).standard_normal((1, 4, keys.shape[2], 8)).astype(np.float32)
    where = range(80, 112, 6)
    ours = select("dhsa:window=3,apart=3", queries, keys, where)[0]
    assert ours == numpy_sets(lambda q, k, _: expected.dhsa(q, k, SMALL_RULES, 3, 3), queries, keys, where)
    # By the mean alone, or the sum, it is another set.
    for power in (0, 1):

        def wrong(q, k, _, power=power):
            n = k.shape[1]
            begins = [*expected.chunks(k, 3, 3)[0], n]
            scores = np.zeros(n)
            for a, b in zip(begins, begins[1:]):
                means = k[:, a:b].mean(1) * (b - a) ** power
                scores[a:b] = sum(means[h // 2] @ q[h] for h in range(4))
            return expected.best_chunks(scores, expected.forced_of(n, 3, 5), 24)

        assert numpy_sets(wrong, queries, keys, where) != ours


@pytest.mark.parametrize("text", ["anchor:theta=1.5", "hip", "s2o:tau=0.2,block=3"])
@pytest.mark.parametrize("prefill", ["exact", "tile"])
def test_blocks_of_products_change_nothing(text, prefill, monkeypatch):
    """Where a prompt is long its queries are taken some at a time."""
    model, x = make_model(layers=1), np.random.default_rng(8).standard_normal((96, 64))
    rules = dict(TILES, prefill=prefill)
    whole = run_layer(model, x, [96], text, **rules)
    module = sys.modules[f"mlx_dsa.rules.{text.partition(':')[0]}"]
    for size in (1, 20_000):
        monkeypatch.setattr(module, "_BLOCK", size)
        assert np.abs(run_layer(model, x, [96], text, **rules) - whole).max() < 1e-5


@pytest.mark.parametrize("text", [*FORMS, "reuse:of=hip", "reuse:of=quest:page=4,every=3"])
def test_the_command_line_takes_them_by_name(text, folder):
    small = ["--top-k", "96", "--n-recent", "8", "--max-tokens", "3"]
    options = ["--select", text, "--evict", "window", "--cache", "full", "--prompt", "a " * 120]
    for prefill in ("exact", "tile"):
        arguments = ["generate", "--model", folder, *small, *options, "--prefill", prefill]
        run = CliRunner().invoke(main, arguments)
        assert run.exit_code == 0, run.output


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(select="anchor:theta=-1"), "'theta' must be a number of at least 0"),
        (dict(select="anchor:theta=nan"), "'theta' must be a number of at least 0"),
        (dict(select="hip:block=0"), "'block' must be at least 1"),
        (dict(select="s2o:tau=1"), "'tau' must be at least 0 and below 1"),
        (dict(select="s2o:block=0"), "'block' must be at least 1"),
        (dict(select="dhsa:window=0"), "'window' must be at least 1"),
        (dict(select="dhsa:apart=-1"), "'apart' must be at least 0"),
        (dict(select="anchor", cache="tiered"), "reads the keys"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        SparseConfig(**fields)
