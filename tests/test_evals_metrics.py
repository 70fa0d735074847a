"""Perplexity, recall@K and mass@K, memory and word problems, against independent calculations."""

import json
import math

import mlx.core as mx
import numpy as np
import pytest
from evals_subject import make_subject
from mlx_lm.models.qwen3 import Attention
from mlx_lm.perplexity import eval_ppl

from mlx_dsa import BudgetKVCache
from mlx_dsa.evals import gsm8k, make_policies, memory, ppl, retrieval
from mlx_dsa.evals.fidelity import coverage, selection_mask, slots_mask, true_attention
from mlx_dsa.tasks.documents import load_documents, windows_of


@pytest.fixture(scope="module")
def subject():
    return make_subject()


def test_dense_perplexity_is_mlx_lms(subject):
    # From the second token on: what the two define alike. K = 1 would score all but the first.
    policies = make_policies([{"policy": "exact", "top_k": 1, "n_sink": 0, "n_recent": 1}], subject.config)
    result = ppl(subject, policies, length=200, limit=3, batch_size=2)
    row = next(r for r in result["rows"] if r["policy"] == "dense")
    windows = windows_of(load_documents(), subject.tokenizer, 200, 200, 3)
    data = mx.array([w["ids"] for w in windows])
    assert row["n"] == 3 * 198
    total = 3 * 199 * math.log(eval_ppl(subject.model, data)[0])
    first = subject.model(data[:, :1])[:, 0]
    first = (mx.logsumexp(first, axis=-1) - mx.take_along_axis(first, data[:, 1:2], axis=-1)[:, 0]).sum()
    assert row["value"] == pytest.approx(math.exp((total - first.item()) / row["n"]), rel=1e-5)


def test_stride_scores_each_token_once(subject):
    policies = make_policies([{"policy": "exact", "top_k": 64}], subject.config)
    strided = ppl(subject, policies, length=256, stride=100, limit=2)
    assert [item["n"] for item in strided["items"]] == [100, 100]
    whole = ppl(subject, policies, length=256, limit=2)
    # Position 64 is the first that sees 65 keys; the last token is predicted at position 254.
    assert [item["n"] for item in whole["items"]] == [191, 191]
    buckets = whole["rows"][1]["buckets"]
    assert (buckets[0]["from"], buckets[-1]["to"]) == (64, 255)
    assert sum(b["n"] for b in buckets) == whole["rows"][1]["n"]


@pytest.mark.parametrize("path", ["prefill", "decode"])
def test_perplexity_sees_what_is_dropped(subject, path):
    policies = make_policies(["dense", "sparse", "window"], subject.config)
    result = ppl(subject, policies, length=200, path=path, decode_tokens=12, limit=2)
    pairs = {p["policy"]: p for p in result["pairs"]}
    assert set(pairs) == {"sparse@64", "window@64"}
    for row in (r for r in result["rows"] if r["policy"] != "dense"):
        assert row["kl"] > 0
        assert pairs[row["policy"]]["difference"] != 0
    assert result["rows"][0]["n"] == (2 * 135 if path == "prefill" else 2 * 11)


def test_two_policies_are_compared_over_the_same_tokens(subject):
    specs = ["full", "window", {"policy": "window", "top_k": 80}]
    policies = make_policies(specs, subject.config)
    options = dict(length=200, path="decode", decode_tokens=12, limit=2)
    result = ppl(subject, policies, compare=["full/window", "window@80"], **options)
    pairs = {(p["policy"], p["against"]): p for p in result["pairs"]}
    names = ("full@64", "window@64", "window@80")
    between = [(names[0], names[1]), (names[0], names[2]), (names[1], names[2])]
    assert list(pairs) == [(name, "dense") for name in names] + between
    for first, second in between:
        pair = pairs[first, second]
        both = [pairs[name, "dense"]["difference"] for name in (first, second)]
        assert pair["difference"] == pytest.approx(both[0] - both[1], abs=1e-12)
        assert pair["low"] <= pair["difference"] <= pair["high"] and pair["n"] == 22
        assert pair["difference"] != 0
    # Where fewer keys leave more tokens to score, the tokens are not the same.
    options["path"] = "prefill"
    result = ppl(subject, policies, compare=["full/window", "window@80"], **options)
    against = [(p["policy"], p["against"]) for p in result["pairs"] if p["against"] != "dense"]
    assert against == between[:1]


def test_the_decode_path_is_token_by_token(subject):
    policies = make_policies([{"policy": "full", "prefill": "exact"}], subject.config)
    decode = ppl(subject, policies, length=200, path="decode", decode_tokens=12, limit=1)
    window = windows_of(load_documents(), subject.tokenizer, 212, 200, 1)[0]["ids"]
    with policies[0].apply(subject) as patch:
        cache = patch.make_cache()
        logits = subject.model(mx.array([window[:199]]), cache=cache)
        total = 0.0
        for at in range(199, 211):
            logits = subject.model(mx.array([window[at : at + 1]]), cache=cache)[0, -1]
            if at >= 200:
                total += (mx.logsumexp(logits) - logits[window[at + 1]]).item()
    assert decode["items"][0]["nll"] == pytest.approx(total, rel=1e-5)


def test_a_context_no_longer_than_the_budget_is_refused(subject):
    with pytest.raises(ValueError, match="top_k = 64 is no smaller than the context"):
        ppl(subject, make_policies(["dense", "sparse"], subject.config), length=64)
    with pytest.raises(ValueError, match="no query of 64 tokens sees K = 100"):
        retrieval(subject, top_k=[100], length=64)
    with pytest.raises(ValueError, match="no text has 8,000 tokens"):
        ppl(
            subject,
            make_policies(["sparse"], subject.config),
            length=8000,
            documents=1,
            data=__file__,
        )


def _softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("k", [1, 5, 16, 40])
def test_recall_and_mass_are_numpys(k):
    rng = np.random.default_rng(k)
    queries = rng.standard_normal((6, 7, 8)).astype(np.float32)
    keys = rng.standard_normal((2, 50, 8)).astype(np.float32)
    scores = rng.standard_normal((7, 50)).astype(np.float32)
    positions = np.array([k - 1 if k > 20 else 20, 25, 30, 39, 45, 48, 49])
    positions = np.maximum(positions, k - 1)
    logits, probabilities = true_attention(mx.array(queries), mx.array(keys), mx.array(positions), 8**-0.5)
    selected = selection_mask(mx.array(scores), k, mx.array(positions), n_sink=0, n_recent=1)
    recall, mass = (np.array(a) for a in coverage(selected, logits, probabilities, k))
    for row, p in enumerate(positions):
        worth = scores[row, : p + 1].copy()
        worth[p] = np.inf  # n_recent = 1
        chosen = set(np.argsort(-worth)[:k].tolist())
        for head in range(6):
            logit = keys[head // 3, : p + 1].astype(np.float64) @ queries[head, row] * 8**-0.5
            best = set(np.argsort(-logit)[:k].tolist())
            assert recall[head, row] == pytest.approx(len(best & chosen) / k)
            assert mass[head, row] == pytest.approx(_softmax(logit)[list(chosen)].sum(), abs=1e-5)


def test_a_set_of_each_head_counts_for_its_group():
    rng = np.random.default_rng(0)
    queries, keys = (rng.standard_normal(shape).astype(np.float32) for shape in ((6, 7, 8), (2, 50, 8)))
    logits, probabilities = true_attention(mx.array(queries), mx.array(keys), mx.arange(43, 50), 8**-0.5)
    slots = np.sort(np.stack([[rng.permutation(44)[:9] for _ in range(7)] for _ in range(2)]))
    slots[:, ::2, :3] = -1
    together = coverage(slots_mask(mx.array(slots), 50), logits, probabilities, 9)
    for head in range(6):
        mask = slots_mask(mx.array(slots[head // 3]), 50)
        alone = coverage(mask, logits[head : head + 1], probabilities[head : head + 1], 9)
        for both, one in zip(together, alone):
            assert mx.allclose(both[head], one[0])
        assert (np.array(mask).sum(axis=-1) == (slots[head // 3] >= 0).sum(axis=-1)).all()
    assert not mx.allclose(together[1], coverage(slots_mask(mx.array(slots)[::-1], 50), logits, probabilities, 9)[1])


def test_retrieval_of_a_model(subject):
    result = retrieval(subject, top_k=[32, 64, 500], length=300, queries=20, limit=2)
    rows = {(r["policy"], r["top_k"]): r for r in result["rows"] if r["layer"] is None}
    assert result["config"]["top_k"] == [32, 64]  # no query of 300 tokens sees 500 keys
    for k in (32, 64):
        best = rows["attention", k]
        for method in ("index", "random", "window"):
            assert rows[method, k]["mass_value"] < best["mass_value"]
            assert 0 < rows[method, k]["worst"] <= rows[method, k]["value"] <= 1
    # 20 positions a text from the 32nd on, of which those that see 64 keys count for K = 64.
    positions = np.unique(np.linspace(31, 299, 20).astype(int))
    assert rows["index", 32]["n"] == 2 * len(positions)
    assert rows["index", 64]["n"] == 2 * int((positions >= 63).sum())
    assert isinstance(subject.model.layers[0].self_attn, Attention)  # the model is as it was


def test_memory_is_what_the_shapes_say(subject):
    policies = make_policies(["dense", "sparse", "full", "tiered"], subject.config)
    result = memory(subject, policies, lengths=[50, 504])
    rows = {(r["policy"], r["length"]): r for r in result["rows"]}
    entry = 2 * 2 * 32 * 4  # keys and values, 2 heads of 32, float32
    assert rows["dense", 504]["computed"] == 2 * 512 * entry == rows["dense", 504]["value"]
    assert rows["sparse@64", 504]["computed"] == 2 * 64 * (entry + 12 * 4 + 4)
    # 8 tokens were written; each of 2 layers has room for hidden states that wait for index keys.
    waiting = 2 * BudgetKVCache(64).most_late * 64 * 4
    assert rows["sparse@64", 504]["value"] == rows["sparse@64", 504]["computed"] + waiting
    assert rows["sparse@64", 504]["entries"] == [64, 64]
    assert rows["full@64", 504]["computed"] == 2 * 512 * (entry + 12 * 4)
    assert rows["tiered@64", 504]["computed"] is None
    assert all(0 < r["active_gb"] <= r["peak_gb"] for r in result["rows"])


def test_word_problems(subject, tmp_path):
    policies = make_policies(["dense", "sparse"], subject.config)
    result = gsm8k(subject, policies, limit=3, max_tokens=4, many_shot=3)
    row = next(r for r in result["rows"] if r["policy"] == "sparse@64")
    assert (row["n"], row["truncated"], row["longer_than_top_k"], row["dropped"]) == (3, 1, 1, 1)
    short = gsm8k(
        subject,
        make_policies([{"policy": "sparse", "top_k": 512}], subject.config),
        limit=2,
        max_tokens=4,
    )
    assert [r["longer_than_top_k"] for r in short["rows"]] == [0, 0]

    data = tmp_path / "test.jsonl"
    lines = [json.dumps({"question": f"{i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"}) for i in range(5)]
    data.write_text("\n".join(lines))
    result = gsm8k(subject, policies, data=str(data), limit=3, max_tokens=2, prompt="plain", shots=2)
    assert [item["expected"] for item in result["items"][:3]] == ["1", "2", "3"]
    with pytest.raises(ValueError, match="5 worked examples are wanted but there are 2"):
        gsm8k(subject, policies, data=str(data), limit=3, shots=5)


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "holds no problems"),
        ('{"question": "a", "answer": "#### 1"}\n{"question": \n', "line 2 is not JSON"),
        ('{"question": "a", "answer": "#### 1"}\n[1]\n', "line 2 is not a JSON object"),
        ('{"question": "a"}\n', 'line 1 has no "question" and "answer"'),
        ('{"question": "a", "answer": "one"}\n', "line 1: the answer does not end in"),
    ],
)
def test_bad_problem_files(subject, tmp_path, content, message):
    data = tmp_path / "bad.jsonl"
    data.write_text(content)
    with pytest.raises(ValueError, match=message):
        gsm8k(subject, make_policies(["dense"], subject.config), data=str(data))
