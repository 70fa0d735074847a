"""The needle evaluator: controls that must fail, and a control that must not differ."""

import random
import sys
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from builders import make_indexers
from evals_subject import make_subject
from mlx_lm.generate import generate_step

from mlx_dsa import BudgetKVCache
from mlx_dsa.evals import make_policies, make_policy, memory, needle, ppl
from mlx_dsa.evals.generation import answer, converse, read, take_rows
from mlx_dsa.evals.policies import NAMES, pairings
from mlx_dsa.evals.running.watch import verdict
from mlx_dsa.tasks.documents import load_documents
from mlx_dsa.tasks.haystack import Haystack
from mlx_dsa.tasks.needle_items import NeedleSpec, make_items

GRID = dict(lengths=[256], depths=[0.2, 0.6], limit=2, max_tokens=5)


@pytest.fixture(scope="module")
def subject():
    return make_subject()


def _rows(result):
    return {r["policy"]: r for r in result["rows"] if r["depth"] is None}


def test_generation_is_mlx_lms(subject):
    from mlx_lm.models.cache import make_prompt_cache

    prompt = list(range(5, 700))
    with make_policy("sparse", subject.config).apply(subject):
        steps = generate_step(mx.array(prompt), subject.model, max_tokens=12, prefill_step_size=512)
        theirs = [int(token) for token, _ in steps]
        caches = make_prompt_cache(subject.model)
        logits = read(subject.model, mx.array([prompt]), caches)
        ours = answer(subject.model, logits, caches, max_tokens=12, stop_ids=set())
    assert ours[0].ids == theirs


@pytest.fixture
def asked(monkeypatch):
    """Return the offsets at which budget caches are asked for their state."""
    offsets = set()
    own = BudgetKVCache.state

    def state(cache):
        offsets.add(cache.offset)
        return own.fget(cache)

    monkeypatch.setattr(BudgetKVCache, "state", property(state, own.fset))
    return offsets


def test_state_is_read_after_chunks_alone_as_by_mlx_lm(subject, asked):
    """Reading it says that the prompt goes on, so never after its end or in decode."""
    policies = make_policies(["sparse"], subject.config)
    prompt = mx.array([list(range(5, 705))])
    with policies[0].apply(subject) as patch:
        caches = patch.make_cache()
        logits = read(subject.model, prompt, caches)
        answer(subject.model, logits, caches, max_tokens=5, stop_ids=set())
        assert asked == {512, 699}
        asked.clear()
        steps = generate_step(mx.array(prompt[0]), subject.model, max_tokens=5, prefill_step_size=512)
        assert len(list(steps)) == 5 and asked == {512, 699}
    asked.clear()
    memory(subject, policies, lengths=[150])
    assert asked == {149, 158}  # the second is after all steps
    asked.clear()
    ppl(subject, policies, path="decode", length=150, decode_tokens=8, limit=1)
    assert asked == {149}


def test_rows_that_are_taken_go_on_as_those_left(subject, asked):
    text, question = (mx.array([list(range(n, n + 120))]) for n in (5, 900))
    with make_policy("sparse", subject.config).apply(subject) as patch:
        caches = patch.make_cache()
        read(subject.model, text, caches)
        asked.clear()
        taken = take_rows(caches, [0])
        assert not asked
        logits = [subject.model(question, cache=c) for c in (caches, taken)]
    assert mx.array_equal(*logits)
    assert {c.size() for c in (*caches, *taken)} == {64 + 120}  # the text was pruned before it


@pytest.mark.parametrize("name", ["dense", "sparse", "full", "tiered"])
def test_a_batch_says_what_each_says_alone(subject, name):
    rng = np.random.default_rng(0)
    talks = [
        [(rng.integers(3, 4000, 150).tolist(), True), (rng.integers(3, 4000, n).tolist(), True)] for n in (9, 14, 9, 21)
    ]
    # A stop token that rows meet at different times.
    options = dict(max_tokens=6, stop_ids=set(range(0, 4096, 5)))
    with make_policy(name, subject.config).apply(subject):
        together = converse(subject.model, talks, **options)
        alone = [converse(subject.model, [talk], **options)[0] for talk in talks]
    for a, b in zip(together, alone):
        assert [r.ids for r in a.replies] == [r.ids for r in b.replies]
        assert len(a.replies) == 2


@pytest.mark.parametrize("setting", ["in-prompt", "before-question", "two-turns"])
def test_verdicts_of_the_controls(subject, setting):
    policies = make_policies(["dense", "exact", "random", "kept", "evicted"], subject.config)
    rows = _rows(needle(subject, policies, setting=setting, **GRID))
    assert {r["value"] for r in rows.values()} == {0.0}  # a random model answers nothing
    assert "verdicts" not in rows["dense"]
    assert rows["evicted@64"]["verdicts"] == {"evicted": 4}
    assert rows["evicted@64"]["lost_by_layer"]["evicted"] == {"0": 4, "1": 4}
    assert rows["kept@64"]["verdicts"] == {"read": 4}
    assert rows["random@64"]["verdicts"].get("evicted", 0) >= 3
    assert "evicted" not in rows["exact@64"]["verdicts"]


def test_a_budget_that_holds_everything_changes_nothing(subject):
    policies = make_policies(
        ["dense", {"policy": "sparse", "top_k": 512}, {"policy": "tile", "top_k": 512}],
        subject.config,
    )
    result = needle(subject, policies, **GRID)
    replies = {}
    for item in result["items"]:
        replies.setdefault(item["item"], set()).add(item["reply"])
    assert all(len(said) == 1 for said in replies.values())
    assert [p["difference"] for p in result["pairs"]] == [0.0, 0.0]
    assert all(p["only_first"] == p["only_second"] == 0 for p in result["pairs"])


@pytest.mark.parametrize("name", ["dense", "sparse", "kept"])
def test_a_text_is_read_once_for_all_its_questions(subject, name, monkeypatch):
    from mlx_dsa.evals import generation

    reads = []
    inner = generation.read
    monkeypatch.setattr(generation, "read", lambda m, ids, c: reads.append(ids.shape) or inner(m, ids, c))
    policies = make_policies([name], subject.config)
    options = dict(GRID, setting="before-question", per_document=3, batch_size=2)
    together = needle(subject, policies, **options)
    assert sum(shape[0] for shape in reads if shape[1] > 100) == 4
    # The same, a conversation at a time.
    tokenizer = subject.tokenizer
    spec = NeedleSpec(setting="before-question", per_document=3)
    prose = Haystack([d.text for d in load_documents()], tokenizer)
    items = make_items(spec, prose, tokenizer, [256], GRID["depths"], 2)
    for item in items:
        others = [i for i in items if i.turns[0].ids == item.turns[0].ids]
        marks = np.zeros((1, len(item.turns[0].ids)), dtype=np.float32)
        for start, stop in (span for other in others for span in other.spans):
            marks[0, start:stop] = 1
        talk = [(turn.ids, bool(turn.values)) for turn in item.turns]
        stop_ids = set(tokenizer.eos_token_ids)
        with policies[0].apply(subject, mx.array(marks)):
            alone = converse(subject.model, [talk], max_tokens=5, stop_ids=stop_ids)
        reply = tokenizer.decode(alone[0].replies[0].ids).strip()
        assert reply == next(r["reply"] for r in together["items"] if r["item"] == item.key)


READERS = [
    *("full", "retention", "index", "window", "digits", "keydiff", "snapkv", "kept"),
    {"policy": "tiered", "cold_bits": 16},
]


@pytest.mark.parametrize("setting, turns", [("before-question", 1), ("before-question", 2), ("in-prompt", 1)])
def test_policies_that_read_densely_share_one_reading(setting, turns, monkeypatch):
    module = sys.modules["mlx_dsa.evals.asking"]

    subject = make_subject(tied=False)
    subject = subject._replace(indexers=make_indexers(subject.model, retention_dim=4))
    config = replace(subject.config, prefill="dense")
    options = dict(GRID, setting=setting, per_document=2, turns=turns, batch_size=2)
    policies = make_policies(["dense", *READERS], config)
    reads = []
    inner = module.DenseReading
    monkeypatch.setattr(module, "DenseReading", lambda m, ids: reads.append(ids.shape) or inner(m, ids))
    together = needle(subject, policies, **options)
    assert sum(shape[0] for shape in reads) == 4
    assert all(item["peak_gb"] is None for item in together["items"])
    for policy in policies:  # one policy alone reads for itself
        alone = needle(subject, [policy], **options)["items"]
        mine = [item for item in together["items"] if item["policy"] == policy.label]
        for a, b in zip(alone, mine, strict=True):
            assert [a[k] for k in ("item", "reply")] == [b[k] for k in ("item", "reply")]
            assert a.get("lost") == b.get("lost")


@pytest.mark.parametrize("name", ["dense", "retention", "index", "exact"])
def test_an_opening_and_its_end_are_one_prompt(name):
    subject = make_subject(tied=False, retention_dim=4)
    (policy,) = make_policies([name], subject.config)
    options = dict(max_tokens=5, stop_ids=set(subject.tokenizer.eos_token_ids))
    rng = random.Random(3)
    text, ends = ([rng.randrange(5, 4000) for _ in range(n)] for n in (150, 24))
    parts = [[(text, False), (ends[:12], True)], [(text, False), (ends[12:], True)]]
    with policy.apply(subject):
        whole = [[(talk[0][0] + talk[1][0], True)] for talk in parts]
        expected = converse(subject.model, whole, **options)
        found = converse(subject.model, parts, opening=True, **options)
        pruned = converse(subject.model, parts, **options)
    assert [h.replies for h in found] == [h.replies for h in expected]
    evicts = name in ("retention", "index")
    assert ([h.replies for h in pruned] != [h.replies for h in expected]) == evicts


def test_what_the_controls_keep(subject):
    """Read the positions off the caches: window, forced in, forced out."""
    marks = np.zeros((1, 200), dtype=np.float32)
    marks[0, 100:110] = 1
    ids = mx.array([list(range(5, 205))])
    kept = {}
    for name in ("window", "kept", "evicted"):
        with make_policy(name, subject.config).apply(subject, mx.array(marks)) as patch:
            caches = patch.make_cache()
            read(subject.model, ids, caches)
            kept[name] = [set(np.array(c.positions)[0].tolist()) for c in caches]
    assert all(s == {0, 1, 2, 3, *range(140, 200)} for s in kept["window"])
    assert all(set(range(100, 110)) <= s for s in kept["kept"])
    assert not any(set(range(100, 110)) & s for s in kept["evicted"])


def test_every_name_is_a_policy():
    subject = make_subject(retention_dim=4, top_k=128)
    policies = make_policies(NAMES, subject.config)
    assert len({p.label for p in policies}) == len(NAMES)
    grid = dict(lengths=[256], depths=[0.5], limit=1, max_tokens=2)
    result = needle(subject, policies, setting="before-question", **grid)
    assert len(result["items"]) == len(NAMES)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("sparce", "'policy' must be one of dense, sparse"),
        ({"policy": "sparse", "topk": 3}, "unknown key 'topk'"),
        ({"policy": "dense", "top_k": 3}, "'dense' takes no top_k"),
    ],
)
def test_wrong_policies(subject, spec, message):
    with pytest.raises(ValueError, match=message):
        make_policy(spec, subject.config)


def test_wrong_lengths(subject):
    policies = make_policies(["dense"], subject.config)
    with pytest.raises(ValueError, match="9,000 tokens are more than the model's 8,192 positions.*Lower --lengths"):
        needle(subject, policies, lengths=[9000])
    with pytest.raises(ValueError, match="must be above 0 but got -"):
        needle(subject, make_policies(["dense"], subject.config), lengths=[-100])


@pytest.mark.parametrize(
    "positions, scaling",
    [(256, None), (64, {"factor": 4.0, "original_max_position_embeddings": 64})],
)
def test_a_whole_conversation_needs_positions(subject, monkeypatch, positions, scaling):
    monkeypatch.setattr(subject.model.args, "max_position_embeddings", positions)
    monkeypatch.setattr(subject.model.args, "rope_scaling", scaling)
    policies = make_policies(["dense"], subject.config)
    talk = dict(lengths=[200], depths=[0.5], limit=1, setting="two-turns")
    with pytest.raises(ValueError, match="more than the model's 256 positions.*--max-tokens"):
        needle(subject, policies, **talk, max_tokens=40)  # the first answer would fit
    assert needle(subject, policies, **talk, max_tokens=2)["items"]


def test_the_worse_verdict_wins_a_draw():
    assert verdict({0: "read", 1: "evicted"}) == "evicted"
    assert verdict({0: "read", 1: "not selected", 2: "read"}) == "read"
    assert verdict(None) is None


def test_a_sweep_may_say_what_goes_with_a_top_k(subject):
    sweep = [{"top_k": 64, "n_recent": 8}, 96]
    policies = make_policies(["dense", "full", "tiered", {"policy": "kept", "top_k": 80}], subject.config, sweep)
    found = {p.label: p.config and (p.config.top_k, p.config.n_recent) for p in policies}
    assert found == {
        "dense": None,
        **{f"{n}@{k}": (k, r) for n in ("full", "tiered") for k, r in ((64, 8), (96, 16))},
        "kept@80": (80, 16),
    }  # fmt: skip
    to_dense = [(label, "dense") for label in found if label != "dense"]
    assert pairings(policies, "dense") == to_dense
    tiered = [("tiered@64", "full@64"), ("tiered@96", "full@96")]
    assert pairings(policies, ["tiered/full", "kept/full", "none"]) == tiered


@pytest.fixture(scope="module")
def talkative():
    return make_subject(tied=False, retention_dim=8, top_k=96)


@pytest.mark.parametrize("setting", ["in-prompt", "before-question", "two-turns"])
def test_texts_read_together_are_answered_as_each_alone(talkative, setting):
    options = dict(GRID, setting=setting, lengths=[200])
    if setting == "before-question":
        options["per_document"] = 4
    # A text that a question is part of is not read again.
    names = [n for n in NAMES if n != "kvzip" or setting == "before-question"]
    policies = make_policies(names, talkative.config)
    alone = needle(talkative, policies, **options)["items"]
    together = needle(talkative, policies, batch_size=4, **options)["items"]

    def heard(records):
        names = ("reply", "correct", "first_correct", "verdict", "lost", "hash")
        return {(r["policy"], r["item"]): {n: r.get(n) for n in names} for r in records}

    assert len({r["reply"] for r in alone}) > len(alone) / 4
    assert heard(together) == heard(alone)
    replies = {p.label: [r["reply"] for r in alone if r["policy"] == p.label] for p in policies}
    assert replies["retention@96"] != replies["index@96"]
