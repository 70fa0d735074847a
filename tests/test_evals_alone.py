"""Perplexity without the dense model, for texts that it has no positions for."""

import json

import pytest
from click.testing import CliRunner
from evals_subject import make_subject

from mlx_dsa.cli import main
from mlx_dsa.evals.perplexity import ppl
from mlx_dsa.evals.policies import make_policies
from mlx_dsa.evals.report.overview import overview
from mlx_dsa.evals.report.plots import plot
from mlx_dsa.evals.report.tables import table

OPTIONS = dict(length=300, path="decode", decode_tokens=40, limit=2)


@pytest.fixture(scope="module")
def results():
    subject = make_subject()
    policies = make_policies(["sparse"], subject.config, [64, 96])
    return [ppl(subject, policies, beside_dense=beside, **OPTIONS) for beside in (True, False)]


def test_it_scores_the_same_tokens_alike(results):
    beside, alone = ({r["policy"]: r for r in result["rows"]} for result in results)
    assert set(alone) == set(beside) - {"dense"} != set(beside)
    for label, row in alone.items():
        assert row["value"] == pytest.approx(beside[label]["value"]) and row["n"] == beside[label]["n"]
        assert "kl" not in row and "dense" not in row["buckets"][0]
    assert results[0]["pairs"] and not results[1]["pairs"]
    records = [result["items"][0] for result in results]
    assert "dense_nll" in records[0] and not {"dense_nll", "kl", "same_top"} & set(records[1])
    assert records[1]["nll"] == pytest.approx(records[0]["nll"])


def test_it_is_shown(results, tmp_path):
    alone = results[1]
    header, rows = table(alone)
    assert len(header) == len(rows[0]) and rows[0][4:] == ["-"] * 4
    label = rows[0][0]
    shown = overview({"columns": ["40"], "rows": {"one": [["run", label]]}}, {"run": alone})[1]
    assert shown == [["one", f"{alone['rows'][0]['value']:.1f}"]]
    plot(alone, tmp_path / "alone.png")
    assert (tmp_path / "alone.png").stat().st_size > 1000
    assert "NaN" not in json.dumps(alone)


def test_a_context_scores_the_same_tokens_with_less_before_them():
    subject = make_subject()
    policies = make_policies(["sparse"], subject.config, [64])
    options = dict(OPTIONS, beside_dense=False)
    whole, none_cut = (ppl(subject, policies, context=c, **options) for c in (None, 300))
    assert none_cut["rows"] == whole["rows"]
    last = ppl(subject, policies, context=100, **options)
    assert last["rows"][0]["n"] == whole["rows"][0]["n"]
    assert last["rows"][0]["value"] != whole["rows"][0]["value"]
    for wrong in (0, 301):
        with pytest.raises(ValueError, match="'context'.*between 1 and length"):
            ppl(subject, policies, context=wrong, **options)
    with pytest.raises(ValueError, match="path decode"):
        ppl(subject, policies, context=100, length=300, path="prefill")


def test_a_context_needs_positions_for_what_is_read_alone():
    subject = make_subject()
    subject.model.args.max_position_embeddings = 150
    policies = make_policies(["sparse"], subject.config, [64])
    options = dict(OPTIONS, beside_dense=False)
    assert ppl(subject, policies, context=100, **options)["rows"][0]["n"] > 0
    with pytest.raises(ValueError, match="160 tokens are more than the model's 150 positions"):
        ppl(subject, policies, context=120, **options)


def test_a_context_leaves_what_is_scored_where_windows_overlap():
    subject = make_subject()
    policies = make_policies(["sparse"], subject.config, [64])
    options = dict(OPTIONS, beside_dense=False, stride=30)
    rows = [ppl(subject, policies, context=c, **options)["rows"][0] for c in (None, 100, 20 + 64)]
    assert [row["n"] for row in rows] == [2 * 30] * 3


def test_the_command_takes_both(tmp_path):
    options = ["--lengths", "400", "--path", "decode", "--decode-tokens", "8", "--limit", "1", "--top-k", "128"]
    options += ["--alone", "--context", "300", "--out", str(tmp_path / "ppl.json")]
    done = CliRunner().invoke(main, ["eval", "ppl", "--policies", "retention", *options])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "ppl.json").read_text())
    assert result["config"]["context"] == 300 and [r["policy"] for r in result["rows"]] == ["retention@128"]
    refused = CliRunner().invoke(main, ["eval", "ppl", "--path", "prefill", *options[:2], "--context", "300"])
    assert refused.exit_code == 2 or "path decode" in refused.output
    assert refused.exit_code and "Traceback" not in refused.output
