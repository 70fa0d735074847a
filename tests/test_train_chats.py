"""Rows of training data: the text that is learnt from, where its replies are, what is left out."""

import json
import re
import warnings
from pathlib import Path

import pytest
from builders import bundled_tokenizer
from click.testing import CliRunner
from local_models import write_model
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from mlx_dsa.cli import main
from mlx_dsa.train import data
from mlx_dsa.train.chats import Chat, read_row
from mlx_dsa.train.data import load_sequences
from mlx_dsa.train.rendering import render_row
from mlx_dsa.train.report import Report, Unusable

QWEN3 = Path(__file__).resolve().parents[2] / "shared" / "data" / "qwen3-tokenizer"

# Written for these tests after the kinds of templates that there are.
TEMPLATES = {
    "chatml": None,  # the bundled model's own
    "drops earlier reasoning": """
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- set content = m.content %}{% set think = '' %}
{%- if m.role == 'assistant' and '</think>' in content %}
{%- set think = content.split('</think>')[0].split('<think>')[-1].strip() %}
{%- set content = content.split('</think>')[-1].lstrip() %}{% endif %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>\n' + think + '\n</think>\n\n' }}{% endif %}
{{- content + '<|im_end|>\n' }}
{%- endfor %}""",
    "no system": """
{%- for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{{- '<start>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end>\n' }}
{%- endfor %}""",
    "mistral-like": """
{%- set ns = namespace(system='') %}{{- '<s>' }}
{%- if messages[0].role == 'system' %}
{%- set ns.system = messages[0].content %}{% set messages = messages[1:] %}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{%- if m.role == 'user' and loop.revindex0 < 2 and ns.system %}
{{- '[INST] ' + ns.system + '\n\n' + m.content + '[/INST]' }}
{%- elif m.role == 'user' %}{{- '[INST] ' + m.content + '[/INST]' }}
{%- else %}{{- ' ' + m.content | trim + '</s>' }}{% endif %}
{%- endfor %}""",
    "llama-like": """
{{- '<|begin_of_text|>' }}{%- if tools %}{{ 'Tools: ' + tools | tojson + '\n' }}{% endif %}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
{%- if m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{{- '{"name": "' + m.tool_calls[0].function.name + '"}<|eom_id|>' }}
{%- else %}{{- m.content | trim + '<|eot_id|>' }}{% endif %}
{%- endfor %}""",
    "says whether there is reasoning": """
{%- for m in messages %}{{- '<' + m.role + '>' }}
{%- if m.role == 'user' %}{{ m.content }}{% elif '</think>' in m.content %}
{{- m.content.replace('<think>', 'He thinks: ') }}
{%- else %}{{ 'He does not think: ' + m.content }}
{%- endif %}{{ '\n' }}{% endfor %}""",
    "marks what it generates": """
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}""",
}
THOUGHT = "<think>\nIt may be.\n</think>\n\n"


def make_tokenizer(template=None):
    return TokenizerWrapper(bundled_tokenizer(template))


def turns(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]


CHATS = {
    "plain": turns("Is it?", "Yes."),
    "a reply that stands in the question too": turns("a is a or b?", "a", "user or a?", "a"),
    "reasoning": turns("Is it?", THOUGHT + "Yes.", "And this?", "<think>\nNo.\n</think>\n\nNo, no."),
    "one with, one without": turns("Is it?", THOUGHT + "Yes.", "And this?", "No, no."),
    "white space": turns("  Is it? \n", "\n Yes. \n\n", "And?", " No.\n"),
    "the same question again": turns("Go on.", "One.", "Go on.", "Two.", "Go on.", "Three."),
    "a reply in lines": turns("Tell.", "One.\nTwo.\n\nThree.\n", "On.", "Four.\nFive."),
}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_is_what_the_template_renders(template, chat, tmp_path):
    """The text is the template's to the character, and each answer is in one of its replies."""
    tokenizer, messages = make_tokenizer(TEMPLATES[template]), CHATS[chat]
    expected = tokenizer.apply_chat_template(messages, tokenize=False)
    text, replies, _ = render_row(tokenizer, {"messages": messages})
    assert text == expected
    answers = [m["content"].split("</think>")[-1].strip() for m in messages[1::2]]
    assert len(replies) == len(answers)
    for answer, (begin, end) in zip(answers, replies):
        assert text[begin:end].strip().endswith(answer)
    for question in (m["content"].strip() for m in messages[::2]):
        assert not any(question in text[begin:end] for begin, end in replies)
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": messages}))
    (sequence,) = load_sequences(file, tokenizer, 4096, 4, 10)
    assert sequence.tokens.tolist() == tokenizer.encode(expected, add_special_tokens=False)
    assert len(sequence.focus)


@pytest.mark.skipif(not QWEN3.is_dir(), reason="Qwen3's tokenizer is not on this machine")
def test_qwen3s_own_template():
    tokenizer = load_tokenizer(QWEN3)
    for messages in CHATS.values():
        text, replies, _ = render_row(tokenizer, {"messages": messages})
        assert text == tokenizer.apply_chat_template(messages, tokenize=False)
        found = [text[begin:end].split("</think>")[-1].strip() for begin, end in replies]
        assert found == [m["content"].split("</think>")[-1].strip() for m in messages[1::2]]


CALL = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_calls_and_tools_are_rendered_and_calls_are_replies(tools):
    tokenizer = make_tokenizer(TEMPLATES["llama-like"])
    messages = [
        {"role": "user", "content": "2 + 3?", "tool_calls": None, "name": None},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "It is 5."},
    ]
    text, replies, _ = render_row(tokenizer, {"messages": messages, "tools": tools})
    clean = [{"role": "user", "content": "2 + 3?"}, {**messages[1], "content": ""}, *messages[2:]]
    assert text == tokenizer.apply_chat_template(clean, tools=TOOLS, tokenize=False)
    assert "Tools: [" in text and "None" not in text
    call, answer = (text[begin:end] for begin, end in replies)
    assert '{"name": "add"}' in call and answer == "It is 5."


def test_a_template_that_wants_the_call_before_its_answer():
    template = """{%- for m in messages %}
{%- if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}{{ raise_exception('no call') }}{% endif %}
{{- '<' + m.role + '>' + m.content }}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}{{ '\n' }}
{%- endfor %}"""
    messages = [*turns("2 + 3?", "Let me see."), {"role": "tool", "content": "5"}, *turns("", "It is 5.")[1:]]
    messages[1]["tool_calls"] = [CALL]
    text, replies, _ = render_row(make_tokenizer(template), {"messages": messages})
    assert [text[a:b] for a, b in replies] == ["Let me see.", "It is 5."]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages if m.role == 'user' %}{{ m.content }}\n{% endfor %}",
        "{{ messages | map(attribute='content') | map('length') | join(' ') }}",
        "{{ 'thinks' if '</think>' in messages[1].content else 'never' }}{{ messages[1].content | upper }}"
        "{{ 'thinks much' if '</think>' in messages[1].content else 'never does' }}",
        "{{ messages[0].content + messages[1].content }}"
        "{{ ' So I thought. ' if '</think>' in messages[1].content else '(quickly)' }}"
        "{{ messages[3].content }}",
    ],
    ids=["leaves replies out", "lengths", "all of it hangs on the reply", "what is between hangs on the reply"],
)
def test_without_places_a_chat_is_learnt_from_as_a_whole_and_counted(template, tmp_path):
    tokenizer, file = make_tokenizer(template), tmp_path / "a.jsonl"
    messages = turns("Is it? " * 9, THOUGHT + "Yes.", "And this?", "No.")
    file.write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.warns(UserWarning, match=r"where the replies are in 1 of 1 rows \(row 1\)"):
        (sequence,) = load_sequences(file, tokenizer, 4096, 1, 10)
    expected = tokenizer.apply_chat_template(messages, tokenize=False)
    assert sequence.tokens.tolist() == tokenizer.encode(expected, add_special_tokens=False)
    assert not len(sequence.focus)


def test_without_places_a_chat_is_kept_whole_too(tmp_path):
    tokenizer = make_tokenizer("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    chats = [turns(f"Is it {i}? " * 8, "Yes.") for i in range(3)]
    file = write_rows(tmp_path / "a.jsonl", *({"messages": m} for m in chats))
    expected = [tokenizer.encode(m[0]["content"], add_special_tokens=False) for m in chats]
    length = len(expected[0]) * 3 // 2
    with pytest.warns(UserWarning, match="in 3 of 3 rows"):
        sequences = load_sequences(file, tokenizer, length, 4, 10)
    assert [s.tokens.tolist() for s in sequences] == expected


# --- rows as people have them ------------------------------------------------------


@pytest.mark.parametrize(
    "row, contents",
    [
        ({"messages": turns("Hi", "Ho")}, ["Hi", "Ho"]),
        ({"messages": turns("Hi", "Ho"), "text": None}, ["Hi", "Ho"]),
        ({"messages": turns([{"type": "text", "text": "H"}, {"text": "i"}], ["Ho"])}, ["Hi", "Ho"]),
        ({"messages": turns("Hi", None, "Hm?", "Ho")}, ["Hi", "", "Hm?", "Ho"]),
        ({"messages": turns("Hi", "Ho", "Hm?")}, ["Hi", "Ho", "Hm?"]),
        ({"prompt": "Hi", "completion": "Ho"}, ["Hi", "Ho"]),
        ({"prompt": turns("Hi"), "completion": turns("", "Ho")[1:]}, ["Hi", "Ho"]),
        ({"prompt": [{"type": "text", "text": "Hi"}], "completion": "Ho"}, ["Hi", "Ho"]),
    ],
)
def test_what_has_a_clear_meaning_is_read(row, contents):
    chat = read_row(row)
    assert isinstance(chat, Chat) and [m["content"] for m in chat.messages] == contents
    assert [m["role"] for m in chat.messages[:2]] == ["user", "assistant"]


def test_text_is_read():
    assert read_row({"text": "Hi", "messages": None}) == "Hi"
    assert read_row({"text": "Hi", "prompt": None, "completion": None}) == "Hi"


PICTURE = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "What?"}]


@pytest.mark.parametrize(
    "row, kind",
    [
        ({"messages": turns("Hi")}, "without a reply"),
        ({"messages": turns("Hi", "")}, "without a reply"),
        ({"messages": turns("Hi", " \n")}, "without a reply"),
        ({"messages": turns("Hi", None)}, "without a reply"),
        ({"prompt": "Hi", "completion": ""}, "without a reply"),
        ({"prompt": "Hi", "completion": None}, "without a completion"),
        ({"prompt": "Hi"}, "without a completion"),
        ({"messages": turns(None, "Ho")}, "no content"),
        ({"messages": turns(PICTURE, "Ho")}, "not text: a image_url"),
        ({"messages": turns("Hi", 5)}, "not text: a int"),
        ({"messages": turns("Hi", {"type": "text", "text": None})}, "not text: a text"),
        ({"messages": ["Hi", "Ho"]}, "no role"),
        ({"messages": [{"content": "Hi"}]}, "no role"),
        ({"messages": {"role": "user", "content": "Hi"}}, "not a list"),
        ({"messages": [*turns("Hi"), {"role": "assistant", "tool_calls": ["add"]}]}, "names no function"),
        ({"messages": [*turns("Hi"), {"role": "assistant", "tool_calls": 5}]}, "names no function"),
        ({"messages": turns("Hi", "Ho"), "tools": "add"}, "tools are not a list"),
        ({"messages": turns("Hi", "Ho"), "tools": ["add"]}, "tools are not a list"),
        ({"text": None}, "without text, messages, or prompt and completion$"),
        ({"text": 5}, "not a string: a int"),
        ({"messages": []}, "without text"),
        ({"instruction": "Hi", "output": "Ho"}, "'instruction', 'output'"),
        ({"text": "cut \ud83d off"}, "half a character"),
        ({"messages": turns("Hi", "\ud83d")}, "half a character"),
        ({"messages": turns("Hi", "Ho"), "tools": [{"name": "\ud83d"}]}, "half a character"),
    ],
)
def test_what_has_none_says_its_kind(row, kind):
    """The fault is the data's, and the chat template is not named."""
    tokenizer = make_tokenizer(TEMPLATES["llama-like"])
    with pytest.raises(Unusable) as error:
        render_row(tokenizer, row)
    told = f"{error.value.kind}: {error.value.detail}".removesuffix(": ")
    assert re.search(kind, told) and "template" not in told


def spoilt(value, replacement):
    """Yield copies of a JSON value with one place in it replaced, for every place."""
    yield replacement
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        for other in spoilt(inner, replacement) if isinstance(inner, (dict, list)) else [replacement]:
            copy = value.copy()
            copy[key] = other
            yield copy


ODD = [None, 5, 1.5, True, "", "x", "\ud83d", [], {}, [None], [[]], [5], {"a": 1}, [{}], [{"a": None}]]


@pytest.mark.parametrize("template", ["chatml", "llama-like"])
@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_any_damage_of_a_row_is_read_or_left_out(template, odd):
    tokenizer = make_tokenizer(TEMPLATES[template])
    calls = [*turns("2 + 3?"), {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    rows = [
        {"messages": calls + turns("Hi", [{"type": "text", "text": "Ho"}]), "tools": TOOLS},
        {"prompt": turns("Hi"), "completion": "Ho"},
    ]
    for row in (bad for good in rows for bad in list(spoilt(good, odd))[1:]):
        try:
            text, replies, _ = render_row(tokenizer, row)
        except Unusable as error:
            assert "template" not in error.kind
        else:
            tokenizer.encode(text)
            assert all(0 <= begin < end <= len(text) for begin, end in replies)


@pytest.mark.parametrize(
    "template, messages, reason",
    [
        ("no system", [{"role": "system", "content": "Be."}, *turns("Hi", "Ho")], "System role not"),
        ("mistral-like", turns("Hi", "Ho")[::-1], "Roles must alternate"),
    ],
)
def test_what_the_template_refuses_is_said_by_the_template(template, messages, reason):
    with pytest.raises(Unusable, match="chat template cannot render") as error:
        render_row(make_tokenizer(TEMPLATES[template]), {"messages": messages})
    assert reason in error.value.detail


def test_a_broken_template_and_none(tmp_path):
    with pytest.raises(Unusable, match="chat template cannot render"):
        render_row(make_tokenizer("{% for m in messages %}"), {"messages": turns("Hi", "Ho")})
    tokenizer = bundled_tokenizer()
    tokenizer.chat_template = None
    for without in (tokenizer, TokenizerWrapper(tokenizer)):
        with pytest.raises(Unusable, match="no chat template"):
            render_row(without, {"messages": turns("Hi", "Ho")})


# --- files of them -----------------------------------------------------------------

GOOD = [{"text": "It rained on the hills. " * 8}] * 6
BAD = [
    b'{"text": "cut \\ud83d off"}',
    b'{"text": "caf\xe9"}',
    b"// a comment",
    b'{"text": null}',
    b'{"messages": [{"role": "user", "content": "Hi"}]}',
    b'{"messages": [{"role": "user", "content": "Hm"}]}',
]


def write_rows(path, *rows):
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows]
    path.write_bytes(b"\n".join(lines))
    return path


def load(path, tokenizer=None):
    return load_sequences(path, tokenizer or make_tokenizer(), 64, 16, 99)


def same(these, those):
    return [s.tokens.tolist() for s in these] == [s.tokens.tolist() for s in those]


def test_broken_rows_are_left_out_and_counted_in_one_line(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = load(write_rows(tmp_path / "good.jsonl", *GOOD))
    file = write_rows(tmp_path / "a.jsonl", *GOOD[:3], *BAD, b"", *GOOD[3:])
    with pytest.warns(UserWarning) as told:
        assert same(load(file), whole)
    (line,) = (str(w.message) for w in told)
    assert line == (
        f"{file}: Left out 6 of 12 rows: 1 with half a character (a lone surrogate) (row 4), "
        "1 not UTF-8 (line 5), 1 not JSON (line 6), 1 without text, messages, or prompt and "
        "completion (row 7), 2 without a reply of the assistant (rows 8, 9)."
    )


def test_where_nothing_is_left_the_run_is_refused_in_one_line(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", *BAD)
    with warnings.catch_warnings(), pytest.raises(ValueError) as error:
        warnings.simplefilter("error")
        load(file)
    line = str(error.value)
    assert "holds no text. Left out 6 of 6 rows" in line and "row 1" in line and "\n" not in line


def test_marks_and_line_ends_of_other_systems(tmp_path):
    chats = [{"prompt": f"Is it {i}? " * 9, "completion": "Yes. " * 9} for i in range(4)]
    whole = load(write_rows(tmp_path / "good.jsonl", *GOOD, *chats))
    file = tmp_path / "a.jsonl"
    content = (tmp_path / "good.jsonl").read_bytes().replace(b"\n", b"\r\n")
    file.write_bytes(b"\xef\xbb\xbf" + content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(load(file), whole)


def test_one_huge_line_is_the_text_that_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LONGEST", 1 << 12)
    monkeypatch.setattr(data, "_TEXT_BLOCK", 1 << 13)
    text = "It rained on the hills. " * 3_000
    sequences = load(write_rows(tmp_path / "a.jsonl", {"text": text}))
    tokenizer = make_tokenizer()
    read = [t for s in sequences for t in s.tokens.tolist()]
    assert len(sequences) == 99 and text.startswith(tokenizer.decode(read))


def test_many_places_are_not_all_named():
    report = Report()
    for row in range(1, 6):
        report.begin(row)
        report.leave_out("broken", f"reason {row} " * 99)
    assert str(report).startswith("Left out 5 of 5 rows: 5 broken (rows 1, 2, 3, ...: reason 1")
    assert len(str(report)) < 250
    assert str(Report()) == ""


def test_the_command_says_what_it_left_out(tmp_path):
    """Once when the data is read, and again beside the result, hours later."""
    model = write_model(tmp_path / "model")
    file = write_rows(tmp_path / "a.jsonl", *GOOD, BAD[0])
    options = "--steps 1 --sequence-length 64 --top-k 16 --n-recent 4 --held-out 1 --query-rows 8"
    given = ["--model", model, "--data", file, "--out", tmp_path / "out", *options.split()]
    done = CliRunner().invoke(main, ["train", *map(str, given)])
    assert done.exit_code == 0, done.output
    left_out = "Left out 1 of 7 rows: 1 with half a character (a lone surrogate) (row 7)."
    assert f"Note: {file}: {left_out}" in done.stderr
    assert done.stderr.splitlines()[-1] == left_out
    write_rows(file, BAD[0])
    given[given.index("--out") + 1] = tmp_path / "other"
    done = CliRunner().invoke(main, ["train", *map(str, given)])
    assert done.exit_code == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("Error: ") and "Left out 1 of 1 rows" in line and not (tmp_path / "other").exists()
