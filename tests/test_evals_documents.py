"""The evaluators' readers: what is no text in a user's own file is named by file and line."""

import gzip
import json

import pytest

from mlx_dsa.evals.word_problems import load_problems
from mlx_dsa.tasks.documents import load_documents

BOM = b"\xef\xbb\xbf"


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("a.txt", b"One.\ncaf\xe9.", "line 2 holds bytes that are not UTF-8"),
        ("a.txt", "One.".encode("utf-16"), "UTF-16"),
        ("a.txt", b"One\0.", "line 1 holds zero bytes"),
        ("a.pdf", b"%PDF-1.4\n\xff\xfe", "line 2 holds bytes"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "cut \\ud83d off"}', "line 3 holds half a character"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}', "line 2 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}', 'line 2 has no "text"'),
        ("a.jsonl", b'{"text": "a"}\n{"messages": []}', 'line 2 has no "text"'),
        ("a.jsonl", b'// a\n{"text": "a"}', "line 1 is not JSON"),
        ("a.jsonl", b"[1]", "line 1 is not a JSON object"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-9], "cannot be read"),
        ("a.jsonl.gz", b'{"text": "a"}\n', "cannot be read"),
    ],
)
def test_nothing_is_left_out_of_a_text_that_is_measured(tmp_path, name, content, reason):
    path = write(tmp_path, name, content)
    for source in (path, tmp_path) if name != "a.pdf" else (path,):
        with pytest.raises(ValueError, match=reason) as error:
            load_documents(str(source))
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_marks_and_line_ends_are_no_text(tmp_path):
    write(tmp_path, "a.txt", BOM + b"One.\r\nTwo.\r\n")
    write(tmp_path, "b.jsonl", BOM + b'{"text": "Three."}\r\n{"text": "Four.", "title": 5}\r\n')
    write(tmp_path, "._a.txt", b"\0\5\26\7 what a Mac leaves beside a file \xff")
    assert [(d.name, d.text) for d in load_documents(str(tmp_path))] == [
        ("a.txt", "One.\nTwo.\n"),
        ("b.jsonl:1", "Three."),
        ("b.jsonl:2", "Four."),
    ]


@pytest.mark.parametrize("key", ["question", "answer"])
def test_a_problem_that_is_no_text_is_named(tmp_path, key):
    good = {"question": "1 + 1?", "answer": "#### 2"}
    lines = [json.dumps(row) for row in (good, {**good, key: "cut \ud83d off #### 2"})]
    path = write(tmp_path, "a.jsonl", BOM + "\n".join(lines).encode())
    with pytest.raises(ValueError, match="line 2 holds half a character") as error:
        load_problems(str(path))
    assert str(path) in str(error.value)
    write(tmp_path, "a.jsonl", BOM + lines[0].encode())
    assert [p.question for p in load_problems(str(path))] == ["1 + 1?"]
