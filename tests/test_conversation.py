"""A chat feeds each token once, in the chat template's order."""

import os
import signal
from types import SimpleNamespace

import mlx.core as mx
import pytest
from local_models import write_indexers, write_model

from mlx_dsa import load_preset, patch_sparse_generate
from mlx_dsa.cli import conversation as module
from mlx_dsa.cli.conversation import Conversation
from mlx_dsa.cli.interrupt import Interrupt


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    root = tmp_path_factory.mktemp("local")
    model, indexer = write_model(root / "model"), write_indexers(root / "indexer")
    return load_preset(None, model=str(model), indexer=str(indexer))


@pytest.fixture
def fed(preset, monkeypatch):
    """Note the tokens that the model is fed, through mlx-lm's own loop."""
    tokens = []
    inner = type(preset.model).__call__

    def spy(self, inputs, cache=None, **options):
        tokens.extend(inputs[0].tolist())
        return inner(self, inputs, cache=cache, **options)

    monkeypatch.setattr(type(preset.model), "__call__", spy)
    return tokens


def say(conversation, *messages):
    return ["".join(conversation.ask(message)) for message in messages]


def force(tokens):
    """Return a sampler that draws the given tokens, one after the other."""
    queue = list(tokens)
    return lambda logprobs: mx.array([queue.pop(0) if queue else 1])


def test_turns_follow_the_template(preset, fed):
    tokenizer = preset.tokenizer
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    answers = [tokenizer.encode(t, add_special_tokens=False) for t in ("Yes.", "No.")]
    # After an end mark mlx-lm has drawn, though not fed, one token more.
    drawn = [*answers[0], end, 9, *answers[1], end, 9]
    chat = Conversation(preset.model, tokenizer, system="Be short.", sampler=force(drawn))
    assert say(chat, "Is it?", "And this?") == ["Yes.", "No."]
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Is it?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And this?"},
        {"role": "assistant", "content": "No."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert fed == tokenizer.encode(text.rstrip("\n"), add_special_tokens=False)
    assert chat.report.seen == len(fed)


def test_an_answer_cut_short_gets_its_end_mark(preset, fed):
    tokenizer = preset.tokenizer
    chat = Conversation(preset.model, tokenizer, sampler=force(range(50, 90)), max_tokens=3)
    say(chat, "One", "Two")
    text = tokenizer.decode(fed)
    assert text.count("<|im_end|>") == 3
    assert chat.cache[0].offset == len(fed)
    between = tokenizer.encode("<|im_end|>\n<|im_start|>user\nTwo", add_special_tokens=False)
    start = len(tokenizer.encode("<|im_start|>user\nOne<|im_end|>\n<|im_start|>assistant\n")) + 3
    assert fed[start : start + len(between)] == between


def test_sparse_turns_keep_to_the_budget(preset, fed):
    with patch_sparse_generate(preset.model, preset.indexers, top_k=100):
        chat = Conversation(preset.model, preset.tokenizer, max_tokens=4)
        say(chat, "A line of text. " * 60, "And then?", "And then?")
        assert chat.report.seen == len(fed) > 300
        assert chat.report.kept == (100, 100)
        assert chat.report.kv_bytes < chat.report.dense_bytes


def test_stopping_between_tokens_keeps_all_layers_alike(preset, fed):
    chat = Conversation(preset.model, preset.tokenizer, max_tokens=50)
    pieces = []
    chat.stopped = lambda: len(pieces) >= 3
    for piece in chat.ask("Go on"):
        pieces.append(piece)
    assert len(pieces) <= 4
    assert {layer.offset for layer in chat.cache} == {len(fed)}
    chat.stopped = lambda: False
    say(chat, "Again")
    assert chat.cache[0].offset == len(fed)


def test_stopping_while_reading(preset, fed, monkeypatch):
    monkeypatch.setattr(module, "chunk_size", lambda: 64)
    chat = Conversation(preset.model, preset.tokenizer, stopped=lambda: len(fed) >= 128)
    assert say(chat, "A line of text. " * 60) == [""]
    assert chat.report.first is None and chat.report.seen == len(fed) == 128
    chat.stopped = lambda: False
    chat.max_tokens = 2
    say(chat, "Again")
    assert chat.report.first is not None
    assert chat.cache[0].offset == len(fed)


def test_progress_counts_to_the_end(preset):
    seen = []
    chat = Conversation(
        preset.model, preset.tokenizer, max_tokens=1, progress=lambda *n: seen.append(n)
    )
    say(chat, "Hello")
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1]


def test_reset_starts_over(preset, fed):
    chat = Conversation(preset.model, preset.tokenizer, max_tokens=2)
    say(chat, "Hello")
    first = list(fed)
    fed.clear()
    chat.reset()
    say(chat, "Hello")
    assert fed == first


def test_a_tokenizer_without_template_is_refused(preset):
    chat = Conversation(preset.model, SimpleNamespace(has_chat_template=False))
    with pytest.raises(ValueError, match="generate --raw"):
        say(chat, "Hello")


def test_first_ctrl_c_sets_a_flag_and_the_second_stops():
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        assert not interrupt()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


