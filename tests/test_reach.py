"""Which positions a text takes where what is kept is numbered anew, and what is refused."""

import itertools
import warnings

import mlx.core as mx
import pytest
from builders import SHAPES, SMALL_RULES, feed_calls, make_model, make_text, with_heads
from local_models import write_indexers, write_model
from mlx_lm.models.cache import make_prompt_cache
from simulate import generate_calls
from test_compress import refused, run

from mlx_dsa import SparseConfig, load_preset, patch_sparse_generate
from mlx_dsa.cli.conversation import Conversation
from mlx_dsa.evals import make_policies
from mlx_dsa.evals.subject import check_lengths
from mlx_dsa.positions import PositionLimit
from mlx_dsa.reach import Reach, reach_of, reach_with

COMPACT = dict(SMALL_RULES, positions="compact", prefill="stream", stream_chunk=16)
LONG = "word " * 400


@pytest.fixture(scope="module")
def small():
    model = make_model(**SHAPES["mqa"], vocab=1024)
    return model, with_heads(model)


@pytest.fixture
def reached(monkeypatch):
    """Positions that calls have taken, as the layer counts them."""
    taken, check = [], PositionLimit.check

    def listen(self, cache, n_tokens):
        taken.append(cache.number + n_tokens)
        check(self, cache, n_tokens)

    monkeypatch.setattr(PositionLimit, "check", listen)
    return taken


def least_allowed(config, cache, length):
    """Return the fewest positions of a model with which a prompt is not refused."""
    for limit in range(1, 500):
        try:
            Reach(limit, config).check_prompt(cache, length)
            return limit
        except ValueError:
            continue


@pytest.mark.parametrize("prefill", ["stream", "dense"])
@pytest.mark.parametrize("evict, n_recent", [("retention", 5), ("retention", 3), ("index", 5)])
def test_what_is_foretold_is_what_is_taken(small, reached, prefill, evict, n_recent):
    """Over turns of many lengths: never less, and where a text is long no more either."""
    model, indexers = small
    rules = {**COMPACT, "prefill": prefill, "evict": evict, "n_recent": n_recent}
    exact = set()
    with patch_sparse_generate(model, indexers, **rules) as patch:
        for first, second, steps in itertools.product((9, 40, 90), (3, 21, 70), (2, 13)):
            cache = make_prompt_cache(model)
            for length in (first, second):
                needs = least_allowed(patch.config, cache, length)
                reached.clear()
                feed_calls(model, make_text(length), generate_calls(length, 32, 0), cache)
                assert max(reached) + (prefill == "dense") <= needs <= max(reached) + 16
                exact.add(needs - max(reached))
                read = max(reached)
                feed_calls(model, make_text(steps), [1] * steps, cache)
                most = Reach(None, patch.config).most(first + second + 2 * steps, steps)
                assert max(reached) <= most
                if prefill == "stream":
                    assert max(reached) <= 24 + 16 + 13 and read <= 24 + 16 + 13
    assert min(exact) <= 1


@pytest.mark.parametrize("evict, n_recent, wanted", [("retention", 5, 500), ("retention", 3, 40), ("index", 5, 40)])
def test_an_answer_has_the_room_that_there_is(small, reached, evict, n_recent, wanted):
    """Of planned evictions it is without end: without them numbers go on."""
    model, indexers = small
    rules = {**COMPACT, "evict": evict, "n_recent": n_recent}
    with patch_sparse_generate(model, indexers, **rules) as patch:
        cache = make_prompt_cache(model)
        room = Reach(64, patch.config).room(cache, 100, 500)
        assert room == wanted
        feed_calls(model, make_text(100), generate_calls(100, 32, 0), cache)
        reached.clear()
        feed_calls(model, make_text(40), [1] * 40, cache)
        assert max(reached) == (24 + 40 if wanted == 40 else 24 + 5)
    assert Reach(64, SparseConfig(top_k=24, n_recent=5)).room([], 60, 500) == 4
    assert Reach(None).room([], 60, 500) == 500


def test_a_layer_that_keeps_all_counts_the_text(small):
    model = make_model(**SHAPES["gqa2"], vocab=1024)
    indexers = with_heads(model)
    config = SparseConfig(**COMPACT)
    for left_out, keeps_all in (({}, False), ({1: None}, True)):
        chosen = {i: x for i, x in indexers.items() if i not in left_out}
        assert reach_with(model, chosen, config).keeps_all is keeps_all
        with patch_sparse_generate(model, chosen, **COMPACT):
            assert reach_of(model).is_bounded is not keeps_all
    assert reach_with(model, indexers, SparseConfig(**COMPACT, dense_layers=(0,))).keeps_all
    assert not reach_of(model).is_bounded and reach_of(model).config is None
    # It is also what the warning counts.
    model.args.max_position_embeddings = 64
    for chosen, n in ((indexers, 0), ({0: indexers[0]}, 1)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with patch_sparse_generate(model, chosen, **COMPACT) as patch:
                cache = make_prompt_cache(model)
                with patch.reading(cache):
                    mx.eval(model(make_text(200), cache))
        assert sum("longer than the model's 64" in str(w.message) for w in said) == n


@pytest.fixture
def short(tmp_path):
    model, indexer = tmp_path / "model", tmp_path / "indexer"
    write_model(model, max_position_embeddings=128)
    return load_preset(None, model=str(model), indexer=str(write_indexers(indexer)))


def test_a_chat_reads_what_is_longer_than_the_positions(short, reached):
    with patch_sparse_generate(short.model, short.indexers, **COMPACT):
        chat = Conversation(short.model, short.tokenizer, max_tokens=30)
        for message in (LONG, "And?", LONG):
            assert "".join(chat.ask(message)) is not None
        assert chat.report.seen > 800 and max(reached) <= 24 + 16 + 5
        chat.reset()
        chat.read(LONG)
        assert list(chat.complete(LONG)) is not None
    for rules, says in (
        ({**COMPACT, "prefill": "exact"}, "128 positions.* prefill 'stream' with positions 'compact' reads longer"),
        ({**COMPACT, "positions": "absolute"}, "128 positions.* prefill 'stream' with positions 'compact'"),
        ({**COMPACT, "top_k": 120}, "top_k 120 and stream_chunk 16 take 136 .* has 128.* Lower top_k or stream_chunk"),
        ({**COMPACT, "stream_chunk": 105}, "top_k 24 and stream_chunk 105 take 129"),
    ):
        with patch_sparse_generate(short.model, short.indexers, **rules):
            chat = Conversation(short.model, short.tokenizer, max_tokens=4)
            for ask in (chat.ask, chat.check, chat.read, chat.complete):
                with pytest.raises(ValueError, match=says) as error:
                    ask(LONG)
                assert "\n" not in str(error.value) and chat.cache[0].empty()
            assert list(chat.ask("Who?")) is not None  # it is read as ever
    with pytest.raises(ValueError, match="a model with more positions.$"):
        Conversation(short.model, short.tokenizer).ask(LONG)


def test_evaluations_know_which_policies_have_no_limit(short):
    base = SparseConfig(top_k=24, n_sink=3, n_recent=5, stream_chunk=16, positions="compact", prefill="exact")
    dense, full, kept, stream = make_policies(["dense", "full", "retention", "stream"], base)
    assert full.config.positions == "absolute" and stream.config.positions == "compact"
    check_lengths("needle", short, [128], policies=[dense, full, kept, stream])
    check_lengths("needle", short, [128, 10_000], policies=[stream], written=30)
    for policy in (dense, full, kept):
        with pytest.raises(ValueError, match=f"policy {policy.label}.*10,000 .* 128 positions.*Lower --lengths"):
            check_lengths("needle", short, [100, 10_000], policies=[stream, policy])
    (wide,) = make_policies([{"policy": "stream", "stream_chunk": 100}], base)
    with pytest.raises(ValueError, match="stream_chunk 100 take 129 positions"):
        check_lengths("needle", short, [1000], policies=[wide])
    (unplanned,) = make_policies([{"policy": "index", "prefill": "stream"}], base)
    check_lengths("needle", short, [1000], policies=[unplanned], written=88)
    with pytest.raises(ValueError, match="take 129 positions"):
        check_lengths("needle", short, [1000], policies=[unplanned], written=89)


def test_on_the_command_line(tmp_path):
    write_model(tmp_path / "model", max_position_embeddings=128)
    write_indexers(tmp_path / "indexer")
    (tmp_path / "long.txt").write_text(LONG)
    given = ["--model", tmp_path / "model", "--indexer", tmp_path / "indexer", "--file", tmp_path / "long.txt"]
    given += ["--top-k", 60, "--n-recent", 8, "--max-tokens", 3, "--prefill", "stream"]
    small = [*given, "--stream-chunk", 32]
    result = run("generate", *small, "--positions", "compact")
    assert result.exit_code == 0 and "60 entries kept" in result.output
    refused(run("generate", *small), 1, "128 positions", "positions 'compact'")
    refused(run("generate", *given, "--positions", "compact", "--stream-chunk", 80), 1, "take 140 positions")
