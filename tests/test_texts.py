"""Text files as users have them: read whole, or refused by the place that is no text."""

import gzip
import json
import zlib

import pytest

from mlx_dsa import texts
from mlx_dsa.texts import is_broken, read_blocks, read_objects

BOM = b"\xef\xbb\xbf"


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "content, text",
    [
        (b"One.\nTwo.", "One.\nTwo."),
        (BOM + "Düne\n".encode(), "Düne\n"),
        (b"One.\r\nTwo.\r\n", "One.\nTwo.\n"),
        ("a\u2028b\x0bc 😀".encode(), "a\u2028b\x0bc 😀"),
        (b"", ""),
    ],
)
def test_a_text_is_read_whole(tmp_path, content, text):
    assert "".join(read_blocks(write(tmp_path, "a.txt", content))) == text


def test_blocks_are_whole_lines_and_a_long_line_comes_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "LONGEST", 100)
    monkeypatch.setattr(texts, "_BLOCK", 50)
    text = "word " * 8 + "\n" + "x" * 250 + "\n" + "short\n" * 30
    blocks = list(read_blocks(write(tmp_path, "a.txt", text)))
    assert "".join(blocks) == text
    assert max(map(len, blocks)) <= 50 + 100
    assert all(b.endswith("\n") for b in blocks if "x" not in b)


@pytest.mark.parametrize(
    "content, reason",
    [
        ("One.\ncaf\xe9\n".encode("latin-1"), "line 2 holds bytes that are not UTF-8"),
        (b"One.\nTwo.\n\xed\xa0\xbd", "line 3 holds bytes that are not UTF-8"),
        (b"One.\n" * 20_000 + b"\xff", "line 20001 holds bytes"),
        (b"One.\nT\0wo.\n", "line 2 holds zero bytes"),
        ("One.".encode("utf-16"), "is in UTF-16"),
        ("One.".encode("utf-16-be"), "line 1 holds zero bytes"),
    ],
)
def test_what_is_no_text_is_named_by_its_line(tmp_path, content, reason):
    path = write(tmp_path, "a.txt", content)
    with pytest.raises(ValueError, match=reason) as error:
        list(read_blocks(path))
    line = str(error.value)
    assert line.startswith(f"{path} cannot be read") and "UTF-8" in line and "\n" not in line


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_each_line_is_an_object_or_what_it_is_instead(tmp_path, name):
    lines = [
        BOM + b'{"text": "a"}\r',
        b"",
        b'{"text": "caf\xe9"}',
        b"// a comment",
        b"[1]",
        b'{"text": "\\ud83d"}',
        b"[" * 100_000,
        '{"text": "ü\u2028"}'.encode(),
    ]
    content = b"\n".join(lines)
    path = write(tmp_path, name, gzip.compress(content) if name.endswith("gz") else content)
    got = list(read_objects(path))
    assert [line.number for line in got] == [1, 3, 4, 5, 6, 7, 8]
    flaws = [None, "not UTF-8", "not JSON", "not a JSON object", None, "not JSON", None]
    assert [line.flaw for line in got] == flaws
    assert [line.row["text"] for line in got if line.row] == ["a", "\ud83d", "ü\u2028"]


def damage(data):
    return data[:40] + bytes(b ^ 255 for b in data[40:60]) + data[60:]


@pytest.mark.parametrize("change", [lambda d: d[:-9], damage, lambda d: b"plain text", zlib.compress])
def test_a_damaged_archive_is_one_line(tmp_path, change):
    rows = "".join(json.dumps({"text": str(i**9)}) + "\n" for i in range(5_000))
    path = write(tmp_path, "a.jsonl.gz", change(gzip.compress(rows.encode())))
    with pytest.raises(ValueError, match="cannot be read") as error:
        list(read_objects(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_cut_archive_says_where(tmp_path):
    rows = "".join(json.dumps({"text": str(i**9)}) + "\n" for i in range(5_000))
    path = write(tmp_path, "a.jsonl.gz", gzip.compress(rows.encode())[:-9])
    with pytest.raises(ValueError, match=r"after line [\d,]+: Compressed file ended"):
        list(read_objects(path))


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        list(read_blocks(tmp_path / "a.txt"))


def test_half_a_character_is_seen_and_a_whole_one_is_not():
    assert is_broken("cut \ud83d off") and is_broken("\udce9")
    assert not is_broken("whole \U0001f600") and not is_broken("")
