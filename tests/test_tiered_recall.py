"""What a stream into two tiers leaves can be copied, asked, and cleaned up."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from builders import SHAPES, feed_calls, make_indexers, make_model, make_text, with_heads
from mlx_lm.models.cache import make_prompt_cache
from simulate import LOGITS, generate_calls
from test_compress import answer_of, compress, options, refused, run
from test_compress import folder as folder
from test_tiered_stream import ORDERS, STORES, TIERED, hot, rules_of

from mlx_dsa import SparseConfig, load_preset, patch_sparse_generate, save_cache
from mlx_dsa.cache import TieredKVCache
from mlx_dsa.cache.cold_file import ColdFile
from mlx_dsa.cache.reader import Reader
from mlx_dsa.cli.conversation import Conversation
from mlx_dsa.evals import make_policies, needle
from mlx_dsa.evals.generation import take_rows

STREAM = ["--cache", "tiered", "--prefill", "stream", "--stream-chunk", 64]


@pytest.fixture(scope="module")
def small():
    model = make_model(**SHAPES["gqa2"], vocab=1024)
    return model, with_heads(model)


# Rows and copies.


@pytest.mark.parametrize("evict", ORDERS)
@pytest.mark.parametrize("store", STORES)
def test_a_row_of_a_batch_answers_as_alone(small, evict, store, tmp_path):
    model, indexers = small
    calls = generate_calls(90, 40, steps=8) + generate_calls(40, 40, steps=3)
    rows = [make_text(sum(calls), seed) for seed in (1, 2, 3)]

    def read(tokens, row=0):
        with patch_sparse_generate(model, indexers, **{**rules_of(store, tmp_path), "evict": evict}):
            cache = make_prompt_cache(model)
            logits = mx.concatenate(feed_calls(model, tokens, calls, cache), axis=1)
            return logits[row], hot(cache, row)

    alone = [read(row) for row in rows]
    for i in range(3):
        logits, positions = read(mx.concatenate(rows), i)
        assert mx.abs(logits - alone[i][0]).max() < LOGITS
        assert positions == alone[i][1] != alone[i - 1][1]


@pytest.mark.parametrize("evict", ["retention", "index"])
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("before", [[13], [30], [61], [48], [61, 1], [61] + [1] * 9, [61] + [1] * 9 + [50]])
def test_copies_go_on_by_themselves(small, evict, store, before, tmp_path):
    model, indexers = small
    n = sum(before)
    tokens, other = make_text(n + 60), make_text(60, seed=5)
    calls = [20, 19, 1, *[1] * 6]
    with patch_sparse_generate(model, indexers, **{**rules_of(store, tmp_path), "evict": evict}):

        def start():
            cache = make_prompt_cache(model)
            feed_calls(model, tokens[:, :n], before, cache)
            return cache

        def go_on(cache, text):
            return np.array(mx.concatenate(feed_calls(model, text, calls, cache), axis=1)), hot(cache)

        expected = [go_on(start(), text) for text in (tokens[:, n:], other)]
        first = start()
        copies = [copy.deepcopy(first), [c.copy() for c in first], take_rows(first, [0]), first]
        mx.eval([c.state for c in first])
        for i, cache in enumerate(copies):
            logits, positions = go_on(cache, (tokens[:, n:], other)[i % 2])
            assert np.abs(logits - expected[i % 2][0]).max() < LOGITS, i
            assert positions == expected[i % 2][1]
        assert np.abs(expected[0][0] - expected[1][0]).max() > 100 * LOGITS


def test_rows_of_a_batch_that_are_taken_go_on_as_alone(small, tmp_path):
    model, indexers = small
    both = mx.concatenate([make_text(120, seed) for seed in (1, 2)])
    for store in STORES:
        for at in (30, 57):
            with patch_sparse_generate(model, indexers, **rules_of(store, tmp_path)):
                cache = make_prompt_cache(model)
                feed_calls(model, both[:, :at], [at], cache)
                taken = take_rows(cache, [1])
                calls = [120 - at - 8, *[1] * 8]
                ours = mx.concatenate(feed_calls(model, both[1:, at:], calls, taken), axis=1)
                theirs = mx.concatenate(feed_calls(model, both[:, at:], calls, cache), axis=1)
            assert mx.abs(ours - theirs[1:]).max() < 1e-4
            assert mx.abs(ours - theirs[:1]).max() > 1e-2


def test_a_trim_before_the_first_cut_leaves_no_trace(small):
    model, indexers = small
    tokens = make_text(100)
    with patch_sparse_generate(model, indexers, **{**TIERED, "stream_chunk": 32}):
        results = []
        for first, back in ((28, 0), (31, 3)):
            cache = make_prompt_cache(model)
            feed_calls(model, tokens[:, :first], [first], cache)
            assert [c.trim(back) for c in cache] == [back] * len(cache)
            logits = feed_calls(model, tokens[:, 28:], [70, 1, 1], cache)
            results.append((np.array(logits[-1]), hot(cache)))
            assert not any(c.is_trimmable() for c in cache) and cache[0].trim(1) == 0
    assert np.array_equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]


def test_a_conversation_that_fits_at_first_loses_nothing_later(small):
    """Whole after the first answer, cut in the second prompt: as if it had been one prompt."""
    model, indexers = small
    tokens = make_text(120)
    with patch_sparse_generate(model, indexers, **TIERED) as patch:
        cache = make_prompt_cache(model)
        feed_calls(model, tokens[:, :15], [10, 1, 1, 1, 1, 1], cache)
        assert not any(c.split for c in cache)
        with patch.reading(cache):
            feed_calls(model, tokens[:, 15:], [105], cache)
        once = make_prompt_cache(model)
        with patch.reading(once):
            feed_calls(model, tokens, [120], once)
    for one, other in zip(cache, once):
        assert one.cold.size == other.cold.size == 112 and one.offset == 120
        assert one.hot_positions.tolist() == other.hot_positions.tolist()
        for a, b in zip(one.cold.fetch_all(), other.cold.fetch_all()):
            assert mx.abs(a - b).max() < LOGITS


def test_without_a_cut_the_first_step_splits(small):
    """A prompt longer than the budget that ends before a cut."""
    model, indexers = small
    tokens = make_text(50)
    results = []
    for more in ({}, {"prefill": "dense"}):
        with patch_sparse_generate(model, indexers, **{**TIERED, "stream_chunk": 64, **more}):
            cache = make_prompt_cache(model)
            results.append(mx.concatenate(feed_calls(model, tokens, [39, 1, *[1] * 10], cache), axis=1))
            assert cache[0].split and cache[0].cold.size == 50
    assert mx.abs(results[0] - results[1]).max() < LOGITS


# What is asked comes back.


@pytest.mark.parametrize("setting", ["in-prompt", "before-question"])
def test_a_needle_that_was_evicted_is_recalled_and_answered(setting):
    """By the bundled model. Only the newest tokens stay at hand, so the fact is cold; a budget
    has lost it."""
    subject = load_preset("tiny")
    rules = dict(prefill="stream", stream_chunk=128, top_k=128, n_recent=32, evict="window")
    specs = [
        {"policy": "tiered", **rules, "label": "tiered"},
        {"policy": "stream", **rules, "label": "budget"},
    ]
    result = needle(
        subject, make_policies(specs, subject.config), lengths=[512], depths=[0.2], limit=3,
        setting=setting, batch_size=3, max_tokens=20, compare="tiered",
    )  # fmt: skip
    rows = {row["policy"]: row for row in result["rows"] if row["depth"] is None}
    assert {row["n"] for row in rows.values()} == {3}
    assert rows["tiered"]["value"] > 0.5 and rows["budget"]["value"] == 0


# Files, and what is refused.


def test_a_file_is_removed_after_an_error_while_reading(small, tmp_path, monkeypatch):
    model, indexers = small
    path = tmp_path / "cold"
    write, n_written = ColdFile.write, []

    def fail_later(file, at, rows):
        n_written.append(at)
        if len(n_written) == 5:
            raise ValueError("[FileStore] the cold file can't be written: no room.")
        write(file, at, rows)

    monkeypatch.setattr(ColdFile, "write", fail_later)
    with pytest.raises(ValueError, match="can't be written"):
        with patch_sparse_generate(model, indexers, **rules_of("file", tmp_path)):
            cache = make_prompt_cache(model)
            assert path.exists()
            feed_calls(model, make_text(200), [200], cache)
    assert len(n_written) == 5 and not path.exists()
    monkeypatch.undo()
    with patch_sparse_generate(model, indexers, **rules_of("file", tmp_path)) as patch:
        cache = make_prompt_cache(model)
        first = feed_calls(model, make_text(200), [100, 98, 1, 1], cache)[-1]
        patch.clear()
        assert all(c.empty() and not c.split for c in cache)
        assert mx.array_equal(feed_calls(model, make_text(200), [100, 98, 1, 1], cache)[-1], first)
    assert not path.exists()


def test_memory_grows_by_index_keys_and_scores_alone(small, tmp_path):
    """Where the cold entries go to a file."""
    model, indexers = small
    sizes = {}
    with patch_sparse_generate(model, indexers, **rules_of("file", tmp_path)) as patch:
        cache = make_prompt_cache(model)
        with patch.reading(cache):
            for i in range(1, 9):
                feed_calls(model, make_text(256, i), [256], cache)
                sizes[i * 256] = cache[0].nbytes
    # 12 numbers of an index key and one score, in float32.
    assert {sizes[n + 256] - sizes[n] for n in range(512, 2048, 256)} == {256 * 13 * 4}


def test_nothing_waits_to_be_computed_and_holds_what_is_cold(small, tmp_path, monkeypatch):
    """What no output depends on would keep every token's arrays in memory."""
    model, indexers = small

    def grown():
        """Return bytes a token, of reading and of decode."""
        with patch_sparse_generate(model, indexers, **rules_of("file", tmp_path)) as patch:
            cache, sizes = make_prompt_cache(model), []
            with patch.reading(cache):
                for i in range(4):
                    mx.eval(model(make_text(128, i), cache=cache))
                    sizes.append(mx.get_active_memory())
            for i in range(150):
                mx.eval(model(make_text(1, i), cache=cache))
                if i in (20, 149):
                    sizes.append(mx.get_active_memory())
        return (sizes[3] - sizes[1]) / 256, (sizes[5] - sizes[4]) / 129

    # In two layers: index keys, a score and the map, and as much room again.
    assert max(grown()) < 2 * 2 * (13 + 1) * 4
    monkeypatch.setattr(Reader, "tie", lambda self, arrays: None)
    monkeypatch.setattr(TieredKVCache, "_tie_all", lambda self: None)
    assert min(grown()) > 2 * 2 * (13 + 1) * 4


def test_what_does_not_go_together_is_refused(small, tmp_path):
    model, indexers = small
    with pytest.raises(ValueError, match="for cache 'budget' only, not for 'tiered'"):
        SparseConfig(cache="tiered", prefill="stream", positions="compact")
    with patch_sparse_generate(model, indexers, **TIERED) as patch:
        cache = make_prompt_cache(model)
        model(make_text(60), cache=cache)
        with pytest.raises(ValueError, match="can't be saved"):
            save_cache(tmp_path / "a.kv", cache, patch)
    with patch_sparse_generate(model, indexers, **{**TIERED, "top_k": 32}):
        with pytest.raises(ValueError, match="keeps 24 entries but top_k is 32"):
            model(make_text(60), cache=cache)
    with pytest.warns(UserWarning, match="no retention head.*stays at hand"):
        patch_sparse_generate(model, make_indexers(model), **TIERED).restore()


def test_commands_take_it(folder, tmp_path):
    question = ["--prompt", "How many sheep?", "--max-tokens", 12]
    document = ["--file", folder / "book.txt"]
    for more in ([], ["--cold", tmp_path / "cold"], ["--cold-bits", 4]):
        for command in ("chat", "generate"):
            said = document + (question if command == "chat" else question[2:])
            read = run(command, *said, *options(folder), *STREAM, *more)
            assert answer_of(read) and "entries recalled a step" in read.output, read.output
    assert not (tmp_path / "cold").exists()
    assert "prefill stream (a cut every 64)" in run("info", *options(folder), *STREAM).output
    refused(compress(folder, tmp_path / "a.kv", *STREAM), 2, "can't be saved")
    few = ["--lengths", 200, "--depths", 1, "--limit", 1, "--top-k", 100]
    told = run("eval", "needle", *few, "--policies", "tiered", *STREAM[2:], "--compare", "tiered@100")
    assert told.exit_code == 0 and "tiered@100" in told.output, told.output


# A chat.


def chat_about(document, *questions, stops=()):
    """Return the bundled model's last answer about a document that is cold, and the chat.

    Its first questions are stopped as soon as they can be, where `stops` says so.
    """
    preset = load_preset("tiny")
    rules = dict(cache="tiered", cold_bits=16, prefill="stream", stream_chunk=128, top_k=128, n_recent=32)
    with patch_sparse_generate(preset.model, preset.indexers, **{**vars(preset.config), **rules, "evict": "window"}):
        chat = Conversation(preset.model, preset.tokenizer, max_tokens=24)
        chat.read(document)
        for question, stop in zip(questions, [*stops, *[False] * len(questions)]):
            chat.stopped = lambda stop=stop: stop
            answer = "".join(chat.ask(question))
        return answer, chat


@pytest.fixture(scope="module")
def letter():
    prose = "The road was long and the evening was cold, and nobody spoke for a while. " * 12
    return f"{prose}The access code of the lighthouse is 482913. {prose * 3}"


def test_each_token_of_a_question_has_what_is_cold(letter, monkeypatch):
    question = "What is the access code of the lighthouse?"
    answer, chat = chat_about(letter, question)
    asked = next(c for c in chat.cache if isinstance(c, TieredKVCache)).n_selections
    assert "482913" in answer and chat.report.prompt_tokens > 8
    monkeypatch.setattr(Conversation, "_recalling", lambda self, prompt: prompt)
    _, plain = chat_about(letter, question)
    without = next(c for c in plain.cache if isinstance(c, TieredKVCache)).n_selections
    steps = chat.report.tokens - plain.report.tokens
    assert asked - without - steps == chat.report.prompt_tokens - 1  # its last token recalls either way
    assert chat.report.prompt_tokens == plain.report.prompt_tokens and chat.report.seen - steps == plain.report.seen


def test_a_question_that_is_stopped_is_read_on_with_the_next(letter):
    first = "Now that you have read it, and before I ask of anything else, tell me this:"
    question = "What is the access code of the lighthouse?"
    cut = chat_about(letter, first, stops=[True])[1]
    assert cut.report.unread > 0 and not cut.report.tokens
    answer, chat = chat_about(letter, first, question, stops=[True])
    assert "482913" in answer and not chat.report.unread
    assert chat.report.prompt_tokens > cut.report.unread
