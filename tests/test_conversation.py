"""A chat feeds each token once, in the chat template's order."""

import json
import os
import signal
from types import SimpleNamespace

import mlx.core as mx
import pytest
from local_models import write_indexers, write_model

from mlx_dsa import load_preset, patch_sparse_generate, template
from mlx_dsa.cli import conversation as module
from mlx_dsa.cli.conversation import Conversation
from mlx_dsa.cli.interrupt import Interrupt
from mlx_dsa.presets import load_model


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


@pytest.mark.parametrize("cache", ["budget", "full"])
def test_what_was_stopped_is_read_on(preset, fed, monkeypatch, cache):
    monkeypatch.setattr(module, "chunk_size", lambda: 64)
    tokenizer, text = preset.tokenizer, "A line of text. " * 60
    with patch_sparse_generate(preset.model, preset.indexers, top_k=100, cache=cache):
        chat = Conversation(preset.model, tokenizer, stopped=lambda: len(fed) >= 128)
        assert say(chat, text) == [""]
        assert chat.report.first is None and chat.report.seen == len(fed) == 128
        unread = chat.report.unread
        assert unread > 100
        # Stopped once more, now that less is left.
        chat.stopped = lambda: len(fed) >= 192
        assert say(chat, "No.") == [""]
        assert chat.report.unread < unread
        chat.stopped = lambda: False
        chat.max_tokens = 2
        say(chat, "Again")
        assert chat.report.unread == 0 and chat.report.first is not None
        assert chat.cache[0].offset == len(fed)
        say(chat, "And?")
    messages = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "No."},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "Again"},
    ]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = tokenizer.encode(expected, add_special_tokens=False)
    assert fed[: len(expected)] == expected
    assert tokenizer.decode(fed[len(expected) :]).count("<|im_start|>user") == 1


def test_reset_forgets_what_was_stopped(preset, fed, monkeypatch):
    monkeypatch.setattr(module, "chunk_size", lambda: 64)
    chat = Conversation(preset.model, preset.tokenizer, stopped=lambda: len(fed) >= 128)
    say(chat, "A line of text. " * 60)
    chat.stopped = lambda: False
    chat.reset()
    fed.clear()
    chat.max_tokens = 1
    say(chat, "Again")
    assert len(fed) < 30


def test_progress_counts_to_the_end(preset):
    seen = []
    chat = Conversation(preset.model, preset.tokenizer, max_tokens=1, progress=lambda *n: seen.append(n))
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


# No text can say what the program thinks


@pytest.mark.parametrize("text", ["THE-ANSWER-STOOD-HERE", "drawn"])
def test_no_text_is_taken_for_a_boundary(preset, fed, monkeypatch, text):
    """Neither what once was the marker, nor what is drawn as one."""
    text = f"Before {text} and after."
    draws = []
    monkeypatch.setattr(template.secrets, "token_hex", lambda n: draws.pop(0))

    def step(action):
        draws[:] = ["drawn", "another", "a third"]
        fed.clear()
        action(text)

    tokenizer = preset.tokenizer
    begin, end = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"

    chat = Conversation(preset.model, tokenizer, max_tokens=1)
    step(lambda text: say(chat, text))
    assert tokenizer.decode(fed).startswith(begin + text + end)
    step(lambda text: say(chat, text))
    assert tokenizer.decode(fed).startswith(f"<|im_end|>\n{begin}{text}{end}")
    chat = Conversation(preset.model, tokenizer, max_tokens=1)
    step(chat.read)
    assert tokenizer.decode(fed) == f"{begin}{text}\n\n"
    step(lambda text: say(chat, text))
    assert tokenizer.decode(fed).startswith(text + end)


def test_what_is_no_text_is_refused_and_the_chat_goes_on(preset, fed):
    chat = Conversation(preset.model, preset.tokenizer, max_tokens=2)
    for ask in (chat.ask, chat.complete, chat.read):
        with pytest.raises(ValueError, match="character 4 is half of one"):
            ask("caf\udce9")
    assert not fed and not chat.started
    say(chat, "caf\xe9")
    assert "caf\xe9" in preset.tokenizer.decode(fed)


# A text longer than the model's positions


@pytest.fixture
def short(tmp_path):
    model, indexer = tmp_path / "model", tmp_path / "indexer"
    write_model(model, max_position_embeddings=64)
    return load_preset(None, model=str(model), indexer=str(write_indexers(indexer)))


def test_what_has_no_positions_is_refused_before_it_is_read(short):
    chat = Conversation(short.model, short.tokenizer, max_tokens=4)
    long = "word " * 100
    for ask in (chat.ask, chat.complete, chat.read, chat.check):
        with pytest.raises(ValueError, match="more than the model's 64 positions"):
            ask(long)
    assert chat.cache[0].empty() and not chat.started
    say(chat, "Who?", "Who?")
    seen = chat.report.seen
    # It would fit by itself, but not after what was said.
    with pytest.raises(ValueError, match="64 positions"):
        chat.ask("word " * (60 - seen))
    assert chat.report.seen == seen == chat.cache[0].offset
    say(chat, "Who?")


def test_an_answer_ends_at_the_last_position(short):
    drawn = force(range(50, 200))
    chat = Conversation(short.model, short.tokenizer, max_tokens=500, sampler=drawn)
    say(chat, "Who?")
    assert chat.report.cut == "positions" and chat.cache[0].offset == 64
    with pytest.raises(ValueError, match="64 positions"):
        chat.ask("And?")
    chat.reset()
    chat.max_tokens = 3
    say(chat, "Who?")
    assert chat.report.cut == "max_tokens" and chat.report.tokens == 3
    chat.sampler = force([50, 2])
    say(chat, "Who?")
    assert chat.report.cut is None


# Thinking, as Qwen3's template has it

THINKS = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- endfor %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
)
OPENS = THINKS.partition("{%- if enable")[0].replace("assistant\n'", "assistant\n<think>\n'")


@pytest.fixture
def templated(preset, tmp_path):
    """Return a function that loads the tokenizer with another chat template."""

    def load(text):
        folder = write_model(tmp_path / "templated")
        file = folder / "tokenizer_config.json"
        config = {**json.loads(file.read_text()), "chat_template": text}
        file.write_text(json.dumps(config))
        return load_model(str(folder))[1]

    return load


@pytest.mark.parametrize("think", [None, True, False])
def test_the_template_is_told_whether_to_think(preset, fed, templated, think):
    tokenizer = templated(THINKS)
    chat = Conversation(preset.model, tokenizer, think=think, max_tokens=1)
    say(chat, "One", "Two")
    closed = "assistant\n<think>\n\n</think>\n\n"
    assert tokenizer.decode(fed).count(closed) == (2 if think is False else 0)


@pytest.mark.parametrize("think, option", [(True, "--think"), (False, "--no-think")])
def test_a_template_that_cannot_be_told_is_said(preset, think, option):
    chat = Conversation(preset.model, preset.tokenizer, think=think)
    with pytest.raises(ValueError, match=f"{option} has no effect"):
        chat.ask("One")
    chat.template._think = None
    chat.ask("One")


@pytest.mark.parametrize(
    "text, answer, closed",
    [
        (THINKS, "<think>\nWell", True),
        (THINKS, "<think>\nWell\n</think>\n\nYes", False),
        (THINKS, "Yes", False),
        (OPENS, "Well", True),
        (OPENS, "Well\n</think>\n\nYes", False),
    ],
)
def test_an_answer_cut_while_it_thinks_is_closed(preset, fed, templated, text, answer, closed):
    tokenizer = templated(text)
    drawn = tokenizer.encode(answer, add_special_tokens=False)
    chat = Conversation(preset.model, tokenizer, max_tokens=len(drawn), sampler=force([*drawn, 9]))
    # What the user says about thoughts opens and closes nothing.
    say(chat, "What is <think>?", "And </think>? <think>")
    end = "\n</think>\n\n" if closed else ""
    between = f"{answer}{end}<|im_end|>\n<|im_start|>user\nAnd "
    assert between in tokenizer.decode(fed)


@pytest.mark.parametrize(
    "text, says",
    [
        ("{{ raise_exception('No system message, please') }}", "No system message, please"),
        ("{{ messages[0].content.nosuch.either }}", "template fails"),
        ("{% if %}", "template fails"),
    ],
)
def test_a_template_that_raises_is_one_line(preset, templated, text, says):
    chat = Conversation(preset.model, templated(text))
    with pytest.raises(ValueError, match=says):
        chat.ask("Hello")


def test_a_template_that_leaves_out_the_answer_is_said(preset, fed, templated):
    tokenizer = templated("{{- messages[-1].content }}")
    chat = Conversation(preset.model, tokenizer, max_tokens=1)
    say(chat, "One")
    with pytest.raises(ValueError, match="leaves out what is said"):
        chat.ask("Two")
