"""The page that shows what is kept of a text."""

import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from local_models import write_indexers, write_model
from test_compress import options, refused, run

from mlx_dsa.cli.shades import places_of, share_of, tenths, write_page
from mlx_dsa.presets import load_model, resource
from mlx_dsa.template import ChatTemplate

TEXT = 'One <b>&amp;</b> "two" \u00e9\u65e5\u672c \U0001f600\U0001f469\u200d\U0001f680.\n\n  End\x1b of\x7fit \ufb01'


class Page(HTMLParser):
    """The text of the sections, character by character with its shade, and the tables."""

    def __init__(self, file):
        super().__init__()
        self.shown, self.level, self.in_text, self.depth = [], 0, False, 0
        self.tags, self.rows = set(), []
        self.feed(file.read_text(encoding="utf-8"))
        self.rows = [row for row in self.rows if row]

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        kind = dict(attributes).get("class", "")
        if tag == "div" and kind == "text":
            self.in_text = True
        if tag == "b" and self.in_text:
            self.level = int(kind.removeprefix("k"))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag == "div":
            self.in_text = False
        if tag == "b":
            self.level = 0
        if tag == "table":
            self.rows.append([])

    def handle_data(self, data):
        if self.in_text:
            self.shown += [(character, self.level) for character in data]
        elif self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()

    @property
    def text(self):
        return "".join(character for character, _ in self.shown)


@pytest.fixture(scope="module")
def tokenizer():
    return load_model(str(resource("weights/tiny")))[1]


def written(tmp_path, text, places, counts, n_layers, sections=None):
    positions = [np.flatnonzero(np.array(counts) > i) for i in range(n_layers)]
    share = share_of(positions, len(counts))
    assert share.counts.tolist() == list(counts)
    file = tmp_path / "new" / "page.html"
    sections = sections or tenths(text)
    write_page(file, text, places, share, sections, "a <b>.txt", {"tokens <i>": "1 & 2"})
    return file


def test_a_text_is_shown_as_it_is(tokenizer, tmp_path):
    places = places_of(tokenizer, TEXT)
    assert len(places) == len(tokenizer.encode(TEXT, add_special_tokens=False))
    counts = np.random.default_rng(0).integers(0, 4, len(places)).tolist()
    file = written(tmp_path, TEXT, places, counts, 3)
    page = Page(file)
    assert page.text == TEXT.replace("\x1b", "\u241b").replace("\x7f", "\u2421")
    # What is no tag of the page's own came as text.
    raw = file.read_text(encoding="utf-8")
    assert "<title>a &lt;b&gt;.txt" in raw and "tokens &lt;i&gt;<td>1 &amp; 2" in raw
    assert not page.tags & {"script", "link", "img"} and "http" not in raw
    assert "prefers-color-scheme: dark" in raw
    # Every character has the shade of its token; of several, the mean, rounded up.
    expected = np.zeros(len(TEXT), int)
    for i in range(len(TEXT)):
        mine = [c for (start, end), c in zip(places, counts) if start <= i < end]
        expected[i] = -(-sum(mine) // len(mine)) if mine else -1
    several = [places.count(place) > 1 for place in places]
    assert any(several) and not all(several)
    for (character, level), wanted in zip(page.shown, expected):
        assert wanted in (level, -1), character


def test_neighbours_of_one_shade_are_one_element(tmp_path):
    text = "ab " * 50_000
    places = [(3 * i, 3 * i + 2) for i in range(50_000)]
    counts = [i // 5_000 % 3 for i in range(50_000)]
    file = written(tmp_path, text, places, counts, 2)
    assert Page(file).text == text
    assert file.stat().st_size < len(text) + 10_000
    # Where each token differs from the next there are as many elements.
    noisy = written(tmp_path, text, places, [i % 2 for i in range(50_000)], 2)
    assert noisy.stat().st_size > 3 * len(text)


@pytest.mark.parametrize("n_layers", [1, 2, 8, 9, 28, 36])
def test_the_legend_tells_which_counts_a_shade_is_of(tmp_path, n_layers):
    counts = [*range(n_layers + 1), 0]
    text = "x" * len(counts)
    places = [(i, i + 1) for i in range(len(text))]
    file = written(tmp_path, text, places, counts, n_layers, [("Only", 0)])
    levels = [level for _, level in Page(file).shown]
    raw = re.findall(r"</span> (\d+)(?: to (\d+))?: ([\d.]+)%", file.read_text())
    assert len(raw) == min(n_layers, 8) + 1
    share = 0
    for level, (low, high, percent) in enumerate(raw):
        of = range(int(low), int(high or low) + 1)
        assert [levels[c] for c in of] == [level] * len(of)
        assert float(percent) == pytest.approx(100 * (len(of) + (level == 0)) / len(counts), abs=0.051)
        share += len(of)
    assert share == n_layers + 1


def test_parts_of_a_text_have_their_numbers(tmp_path):
    text = "abcdefgh"
    places = [(i, i + 1) for i in range(8)]
    sections = [("Head", 0), ("First", 2), ("Second <i>", 6)]
    file = written(tmp_path, text, places, [2, 2, 0, 1, 2, 1, 0, 0], 2, sections)
    rows = {row[0]: row[1:] for row in Page(file).rows}
    assert rows["Head"] == ["2", "100.0%", "", "0.0%", "100.0%"]
    assert rows["First"] == ["4", "50.0%", "", "25.0%", "25.0%"]
    assert rows["Second <i>"] == ["2", "0.0%", "", "100.0%", "0.0%"]
    assert rows["kept in no layer"] == ["37.5%"] and rows["in all layers"] == ["37.5%"]


def test_a_text_is_divided_where_lines_and_words_end():
    lines = "".join(f"{i:03} has some words.\n" for i in range(200))
    words, none = "word " * 1000, "x" * 1000
    for text, before in ((lines, "\n"), (words, " "), (none, "x")):
        sections = tenths(text)
        assert sections[0] == ("Part 1 of 10", 0) and sections[-1][0] == "Part 10 of 10"
        for i, (_, at) in enumerate(sections[1:], 1):
            assert text[at - 1] == before
            assert 0 <= at - i * len(text) / 10 <= len(text) / 40
    assert [at for _, at in tenths("ab")] == sorted(at for _, at in tenths("ab"))


def test_parts_without_a_token_are_there(tmp_path):
    file = written(tmp_path, "ab", [(0, 2)], [1], 1)
    assert Page(file).text == "ab"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("local")
    mx.random.seed(0)
    write_model(root / "model")
    write_indexers(root / "indexer", retention_dim=4)
    (root / "book.txt").write_text(" ".join(f"{i * i} <sheep> & a goat." for i in range(90)))
    (root / "more.txt").write_text("One more goat.")
    return root


@pytest.mark.parametrize("more", [[], ["--prefill", "stream", "--stream-chunk", 64]], ids=str)
def test_compress_writes_what_its_cache_keeps(folder, tmp_path, more):
    page, file = tmp_path / "a" / "page.html", tmp_path / "a.kv"
    files = [folder / "book.txt", folder / "more.txt"]
    result = run("compress", *files, "--out", file, "--report", page, *options(folder), *more)
    assert result.exit_code == 0 and f"{page}: what is kept" in result.output
    shown = Page(page)
    assert shown.text.startswith("<|im_start|>user\n# book.txt\n\n0 <sheep> & a goat.")
    assert shown.text.endswith("# more.txt\n\nOne more goat.\n\n")
    assert [row[0] for row in shown.rows[-3:]] == ["Before the document", "book.txt", "more.txt"]
    arrays = mx.load(str(file), format="safetensors")
    n_tokens = int(shown.rows[0][1].replace(",", ""))
    counts = np.zeros(n_tokens, int)
    for layer in range(2):
        counts[np.array(arrays[f"{layer}.positions"])[0]] += 1
    assert counts.sum() == 2 * 100
    rows = {row[0]: row[1] for row in shown.rows}
    assert rows["kept, mean of these"] == f"{100 * 100 / n_tokens:.1f}%"
    assert rows["kept in no layer"] == f"{100 * (counts == 0).mean():.1f}%"
    # The newest are kept everywhere.
    assert {level for _, level in shown.shown[-20:]} == {2}


def test_key_heads_that_keep_their_own_are_not_counted_as_layers(folder, tmp_path):
    page, file = tmp_path / "page.html", tmp_path / "a.kv"
    more = ["--prefill", "dense", "--evict", "snapkv:by_head=true", "--report", page]
    result = run("compress", folder / "book.txt", "--out", file, *options(folder), *more)
    assert result.exit_code == 0, result.output
    shown, arrays = Page(page), mx.load(str(file), format="safetensors")
    rows = {row[0]: row[1] for row in shown.rows}
    assert rows["layers with a budget"] == "2 of 2"
    counts = np.zeros(int(rows["tokens read"].replace(",", "")), int)
    kept = [np.array(arrays[f"{layer}.positions"]) for layer in range(2)]
    assert [k.shape[0] for k in kept] == [2, 2]  # a row a key head
    for positions in (row for layer in kept for row in layer):
        counts[positions] += 1
    assert rows["kept, mean of these"] == f"{100 * counts.mean() / 4:.1f}%"
    assert rows["kept by no key head"] == f"{100 * (counts == 0).mean():.1f}%"
    assert rows["by all key heads"] == f"{100 * (counts == 4).mean():.1f}%"
    told = page.read_text(encoding="utf-8")
    assert "how many of 4 key heads, 2 a layer, keep a token" in told and "<th>by no key head<th>by all" in told


def test_a_template_that_changes_a_text_leaves_a_report_of_tenths(folder, tmp_path, monkeypatch):
    whole = ChatTemplate.document
    monkeypatch.setattr(ChatTemplate, "document", lambda self, text: whole(self, text).replace("mill", "m-i-l-l"))
    page, source = tmp_path / "page.html", tmp_path / "mill.txt"
    source.write_text("The mill is old. The river is wide, and the mill turns. " * 20)
    result = run("compress", source, "--out", tmp_path / "mill.kv", "--report", page, *options(folder))
    assert result.exit_code == 0, result.output
    assert "m-i-l-l" in page.read_text(encoding="utf-8")


def test_a_report_that_can_not_be_is_refused_first(folder, tmp_path, monkeypatch):
    file = tmp_path / "a.kv"
    words = ["compress", folder / "book.txt", "--out", file, *options(folder)]
    closed = Path("/proc") if os.geteuid() == 0 else tmp_path / "closed"
    if closed.parent == tmp_path:
        closed.mkdir(mode=0o500)
    (tmp_path / "there.html").write_text("x")
    for page, code, says in (
        (closed / "a.html", 1, "can't be written"),
        (tmp_path, 1, "is a folder"),
        (tmp_path / "there.html", 2, "there.html exists"),
        (file, 2, "are one file"),
    ):
        refused(run(*words, "--report", page), code, says)
    refused(run(*words, "--cache", "full", "--report", tmp_path / "b.html"), 2, "no effect")
    command = sys.modules["mlx_dsa.cli.compress"]
    monkeypatch.setattr(command, "places_of", _can_not)
    refused(run(*words, "--report", tmp_path / "b.html"), 1, "can't tell")
    assert sorted(f.name for f in tmp_path.iterdir() if f != closed) == ["there.html"]


def _can_not(*_):
    raise ValueError("it can't tell")
