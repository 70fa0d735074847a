"""What tables and pictures say, and that they say no more than was measured."""

import matplotlib
import pytest
from click.testing import CliRunner
from evals_subject import make_subject

from mlx_dsa import SparseConfig
from mlx_dsa.cli import main
from mlx_dsa.evals import asking, compare, make_policies, make_policy, needle, plot, ppl, retrieval
from mlx_dsa.evals.report import plots
from mlx_dsa.evals.report.overview import overview
from mlx_dsa.evals.report.stats import bootstrap
from mlx_dsa.evals.report.tables import caption, pairs_table, table
from mlx_dsa.evals.running.results import write_result
from mlx_dsa.evals.subject import policies_config
from mlx_dsa.evals.suite import report

CONFIG = SparseConfig(top_k=128, n_recent=32)
ABOUT = {"versions": {"mlx": "1"}, "work_s": 1.0, "device": dict(device="d", system="s", machine="m", cpus=1)}


def column(header_and_rows, name):
    header, rows = header_and_rows
    return [row[header.index(name)] for row in rows]


@pytest.fixture
def plt():
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")


# Intervals.


def test_one_item_gives_no_interval():
    assert bootstrap([3.0], [2]) == (1.5, None, None)
    assert None not in bootstrap([3.0, 4.0])


@pytest.fixture(scope="module", params=[1, 2])
def texts(request):
    """Return results of perplexity and recall over one text, and over two."""
    subject = make_subject()
    policies = make_policies(["full"], subject.config, [40, 64])
    config = dict(compare=["full@40/full@64"], seed=0)
    perplexity = ppl(subject, policies, length=150, limit=request.param, **config)
    recall = retrieval(subject, top_k=[32], length=100, queries=5, limit=request.param)
    return request.param, perplexity, recall


def test_one_text_has_no_interval(texts, tmp_path):
    n, perplexity, recall = texts
    for result in (perplexity, recall):
        entries = (*result["rows"], *result["pairs"])
        assert all((e["low"] is None) == (n == 1) for e in entries)
        assert all((e["high"] is None) == (n == 1) for e in entries)
        cells = [cell for row in (*table(result)[1], *pairs_table(result)[1]) for cell in row]
        assert any("[one text]" in cell for cell in cells) == (n == 1)
        assert any("]" in cell and ", " in cell for cell in cells) == (n == 2)
        plot(result, tmp_path / "a.png")
    write_result(tmp_path / "a.json", perplexity)
    (pair,) = compare(perplexity, perplexity)[:1]
    assert (pair["low"] is None) == (n == 1)
    done = CliRunner().invoke(main, ["eval", "compare", *[str(tmp_path / "a.json")] * 2])
    assert done.exit_code == 0, done.output
    assert ("one text" in done.output) == (n == 1)


def bars(axis):
    """Return the heights of the error bars that are drawn."""
    drawn = [s for c in axis.containers for lines in c[2:] for line in lines for s in line.get_segments()]
    return [s[1][1] - s[0][1] for s in drawn if len(s) == 2 and s[0][1] == s[0][1]]


def test_what_has_no_interval_gets_no_bar(texts, plt):
    n, perplexity, _ = texts
    axis = plots.plot_ppl(perplexity, plt).axes[0]
    assert len(bars(axis)) == (0 if n == 1 else 2)


# What a policy keeps, and reads.


def needle_result(*names):
    policies = make_policies(["dense", *names], CONFIG)
    cell = dict(length=1024, depth=None, n=4, value=1.0, low=0.5, high=1.0, read_s=1.0, peak_gb=None)
    rows = [{"policy": p.label, "top_k": p.top_k, **cell} for p in policies]
    return {"kind": "needle", "config": {"policies": policies_config(policies, {})}, "rows": rows, "pairs": []}


def test_what_keeps_everything_is_not_said_to_keep_a_share():
    result = needle_result("sparse", "full", "tiered", "retention")
    assert column(table(result), "kept") == ["100.0%", "12.5%", "100.0%", "100.0%", "12.5%"]
    assert column(table(result), "read a step") == ["100.0%", *["12.5%"] * 4]
    assert "retention" not in table(result)[0]


@pytest.mark.parametrize(
    "spec, cache, message",
    [
        ("retention", "full", "an order of eviction, but cache 'full' evicts nothing. Use policy 'full'"),
        ("index", "tiered", "an order of eviction, but cache 'tiered' evicts nothing"),
        ({"policy": "retention", "cache": "full"}, "budget", "an order of eviction"),
        ({"policy": "full", "cache": "budget"}, "budget", "policy 'full' is cache 'full' by itself"),
        ({"policy": "exact", "prefill": "tile"}, "budget", "is prefill 'exact' by itself but got 'tile'"),
    ],
)
def test_a_name_and_a_setting_that_contradict_each_other(spec, cache, message):
    with pytest.raises(ValueError, match=message):
        make_policy(spec, SparseConfig(**{**vars(CONFIG), "cache": cache}))


def test_names_and_settings_that_agree():
    full = SparseConfig(**{**vars(CONFIG), "cache": "full"})
    assert make_policy("window", full).config.cache == "full"  # of a selection, too
    assert make_policy("sparse", full).config.cache == "full"
    assert make_policy({"policy": "retention", "cache": "budget"}, full).label == "retention@128"
    assert make_policy({"policy": "full", "cache": "full"}, CONFIG).label == "full@128"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["needle", "--policies", "full,tiered", "--cache", "budget"], "--cache has no effect on full, tiered"),
        (["ppl", "--policies", "exact", "--prefill", "tile"], "--prefill has no effect on exact"),
        (["memory", "--policies", "dense", "--cache", "full"], "--cache has no effect on dense"),
        (["retrieval", "--cache", "full"], "--cache has no effect"),
    ],
)
def test_an_option_that_no_policy_follows_is_refused(arguments, message):
    done = CliRunner().invoke(main, ["eval", *arguments])
    assert done.exit_code == 2 and message in " ".join(done.output.split())


def test_a_policy_that_ignores_the_cache_is_refused_by_the_command():
    done = CliRunner().invoke(main, ["eval", "needle", "--policies", "retention", "--cache", "full"])
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert "cache 'full' evicts nothing" in done.output


# Names.


def problems_result(data):
    cell = dict(n=8, value=0.5, low=0.2, high=0.8, truncated=0.0, longer_than_top_k=None, dropped=0.0)
    rows = [{"policy": p, "reading": r, **cell} for p in ("dense", "full@64") for r in ("strict", "flexible")]
    config = {"data": data, "model": {"name": "m", "dtype": "d"}}
    return {"kind": "gsm8k", "config": config, "rows": rows, "pairs": [], **ABOUT}


@pytest.mark.parametrize(
    "data, said",
    [
        ("bundled problems", "8 word problems: bundled ones, not those of GSM8K."),
        ("gsm8k", "8 word problems: GSM8K's test set."),
        ("mine.jsonl", "8 word problems: mine.jsonl."),
    ],
)
def test_word_problems_are_named_as_what_they_are(data, said, plt):
    result = problems_result(data)
    assert caption(result) == said
    assert said in report({"runs": [{"name": "p"}]}, {"p": result})
    title = plots.plot_gsm8k(result, plt).axes[0].get_title().replace("\n", " ")
    assert said.removeprefix("8 word problems: ").rstrip(".") in title


def test_an_order_of_eviction_and_a_selection_have_different_names(texts, plt):
    recall = texts[2]
    assert set(column(table(recall), "selection")) == {"indexer", "random", "window", "attention"}
    assert set(column(pairs_table(recall), "selection")) == {"indexer"}
    legend = plots.plot_retrieval(recall, plt).axes[-1].get_legend()
    assert "indexer" in [text.get_text() for text in legend.get_texts()]
    assert column(table(needle_result("index")), "policy") == ["dense", "index@128"]


def test_a_table_says_how_much_of_what_dense_answers_a_policy_does():
    subject = make_subject(tied=False)
    policies = make_policies(["dense", "full", "window"], subject.config, [64])
    result = needle(subject, policies, lengths=[300], depths=[0.5], limit=2, max_tokens=2)
    # As if the dense model and one policy had answered.
    right = {"dense": [True, True], "full@64": [True, True], "window@64": [True, False]}
    for label, outcomes in right.items():
        own = [r for r in result["items"] if r["policy"] == label]
        for record, correct in zip(own, outcomes):
            record["correct"] = correct
    pairs = asking._pairs(result["items"], policies, "dense")
    result = {**result, "pairs": pairs, "rows": asking._rows(result["items"], policies)}
    of_dense = column(table(result), "of dense [95%]")
    assert of_dense[0] == "-" and of_dense[1].startswith("100.0% [34.2, 100.0]")
    assert of_dense[2].startswith("50.0% [9.5, 90.5]")
    spec = {"columns": ["a", "b"], "rows": {"x": [["n", "dense"], ["n", "window@64"]]}}
    header, ((name, first, second),) = overview(spec, {"n": result})
    assert header == ["", "a", "b"] and name == "x" and first.startswith("100.0%")
    assert second == "50.0% [9.5, 90.5]; 50.0% of all"


def test_an_overview_has_perplexity_and_mass(texts):
    n, perplexity, recall = texts
    spec = {"columns": ["a", "b"], "rows": {"x": [["p", "full@40"], ["r", 32]]}}
    ((_, first, second),) = overview(spec, {"p": perplexity, "r": recall})[1]
    pair = next(p for p in perplexity["pairs"] if p["policy"] == "full@40")
    assert first.startswith(f"{100 * (pair['ratio'] - 1):+.1f}% [")
    assert ("one text" in first) == (n == 1)
    mean, worst = (column(table(recall), name) for name in ("over the attention's own", "worst layer"))
    at = column(table(recall), "selection").index("indexer")
    assert second == f"{mean[at]}; worst {worst[at]}"
    assert mean[column(table(recall), "selection").index("attention")] == "1.000"
    assert float(mean[at]) < 1


# Pictures.


def test_a_depth_at_which_nothing_stands_is_left_blank(plt):
    result = needle_result("retention")
    cells = [{**row, "depth": depth, "n": n} for row in result["rows"] for depth, n in ((0.1, 3), (0.9, 5))]
    config = {**result["config"], "task": "definitions", "setting": "before-question"}
    other = {**cells[0], "length": 2048, "n": 4}  # at the first depth only
    whole = plots._grid({**result, "kind": "code", "config": config, "rows": cells}, plt)
    assert whole.get_suptitle().startswith("Code (definitions, before-question), n = 3 to 5 a cell")
    cut = plots._grid({**result, "kind": "code", "config": config, "rows": [*cells[:3], other]}, plt)
    drawn = [sum(len(axis.texts) for axis in figure.axes) // 2 for figure in (whole, cut)]
    assert drawn == [4, 4]  # of the eight that two lengths would have


def test_legends_cover_nothing(texts, plt):
    memory = [dict(policy="dense", length=n, value=n, peak_gb=n) for n in (8, 16)]
    cells = needle_result("full", {"policy": "full", "top_k": 200}, {"policy": "full", "top_k": 300})
    figures = [
        plots.plot_gsm8k(problems_result("gsm8k"), plt),
        plots.plot_ppl(texts[1], plt),
        plots.plot_retrieval(texts[2], plt),
        plots.plot_memory({"rows": memory}, plt),
        plots.plot_needle(cells | {"config": dict(task="t", setting="s")}, plt),
    ]  # fmt: skip
    for figure in figures:
        figure.canvas.draw()
        legends = [(a, a.get_legend()) for a in figure.axes if a.get_legend()]
        assert len(legends) == 1
        for axis, legend in legends:
            assert legend.get_window_extent().x0 >= axis.get_window_extent().x1
    (axis, *_) = figures[3].axes  # memory is measured once
    assert bars(axis) == []
