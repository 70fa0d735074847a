"""The chat at a terminal: what is typed and pasted arrives whole, at any length."""

import json
import re
import shutil
import stat
import time

import pytest
from terminal import Terminal

from mlx_dsa.presets import resource

# One token of the model below: so a long line is read in no time.
FILLER = "The boats lay still, and nobody spoke. " * 10
QUESTION = "The password of the mill is marigold. What is the password of the mill?"
PASTE = "\x1b[200~{}\x1b[201~"
CTRL_C, CTRL_D, UP = b"\x03", b"\x04", b"\x1b[A"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The bundled model, with one token that is read as much text."""
    folder = tmp_path_factory.mktemp("terminal") / "model"
    shutil.copytree(resource("weights/tiny"), folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for token in (tokenizer["added_tokens"][5], config["added_tokens_decoder"]["5"]):
        token["content"] = FILLER
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def line_of(length):
    """Return a line of a question at the end, after what fills it up."""
    n = length - len(QUESTION) - 1
    return (FILLER * (n // len(FILLER) + 1))[-n:] + " " + QUESTION


@pytest.mark.parametrize("term, form", [("dumb", "{}"), ("xterm", PASTE)])
def test_a_line_of_any_length_is_answered_to_its_end(model, term, form):
    chat = Terminal(
        "-m", "mlx_dsa", "chat", "--model", model, "--indexer", model, "--top-k", 256,
        "--max-tokens", 24, term=term,
    )  # fmt: skip
    chat.wait(">>> ")

    def ask(line):
        chat.type(form.format(line).encode() + b"\n")
        shown = chat.wait(r"first token[^\n]*\n")
        chat.wait(">>> ")
        return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)

    assert len("Good night") == 10 and "Goodbye" in ask("Good night")
    for length in (4_000, 100_000):
        line = line_of(length)
        assert len(line) == length
        shown = ask(line)
        # The line itself goes on after these words.
        assert re.search(r"password of the mill is marigold\.\r\n", shown)
    seen = int(re.search(r"([\d,]+) tokens seen", shown)[1].replace(",", ""))
    assert seen > 100_000 // len(FILLER)

    # What doesn't fit is refused in one line; so is what is no text. The chat goes on.
    chat.type(form.format("many " * 17_000).encode() + b"\n")
    refusal = chat.wait(r"Error[^\n]*\n")
    assert "positions" in refusal
    chat.wait(">>> ")
    chat.type(b"caf\xe9\n")
    assert "not UTF-8" in chat.wait(r"Error[^\n]*\n")
    assert "Goodbye" in ask("Good night")
    chat.type(b"/quit\n")
    assert chat.close() == 0 and b"Traceback" not in chat.shown


def test_ctrl_c_while_a_document_is_read(model, tmp_path):
    """The word about the rest stands below the answer, and nothing is drawn over it."""
    file = tmp_path / "text.txt"
    file.write_text("The river was calm. " * 800 + "The password of the mill is marigold.")
    chat = Terminal(
        "-m", "mlx_dsa", "chat", "--model", model, "--indexer", model, "--top-k", 256,
        "--max-tokens", 2, "--file", file, term="xterm",
    )  # fmt: skip
    chat.wait(">>> ")
    chat.type(b"Who?\r")
    chat.wait("Reading")
    chat.type(CTRL_C)
    assert "stopped while reading" in chat.wait("tokens left")
    assert "Reading" not in chat.wait(">>> ")
    chat.type(b"/reset\r")
    assert "forgotten" in chat.wait("forgotten[^\n]*\n")
    chat.wait(">>> ")
    chat.type(CTRL_D)
    assert chat.close() == 0


READ = """
import sys, time
from pathlib import Path
from mlx_dsa.cli.lines import open_lines

with open_lines(Path(sys.argv[1])) as lines:
    print("OPEN")
    while True:
        time.sleep(float(sys.argv[2]))  # an answer, say
        try:
            line = lines.read()
        except EOFError:
            break
        except KeyboardInterrupt:
            line = "INTERRUPT"
        print(f"GOT {len(line)} {ascii(line[-40:])} END")
"""


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """Return a function that starts a program that tells which lines it reads."""
    running = []

    def start(term="xterm", pause=0, typed=b"", history=None):
        history = history or tmp_path_factory.mktemp("lines") / "new" / "history"
        running.append(Terminal("-c", READ, history, pause, term=term, typed=typed))
        return running[-1]

    yield start
    for terminal in running:
        terminal.type(b"\n" + CTRL_D)
        assert terminal.close() == 0
        assert b"Traceback" not in terminal.shown


@pytest.fixture(scope="module")
def terminals(read):
    """One such program for several tests in each kind of terminal."""
    return {term: read(term) for term in ("dumb", "xterm")}


def got(terminal):
    return re.search("GOT (\\d+) '(.*)' END", terminal.wait("GOT .* END")).groups()


@pytest.mark.parametrize("term, form", [("dumb", "{}"), ("xterm", "{}"), ("xterm", PASTE)])
def test_a_paste_arrives_whole_and_soon(terminals, term, form):
    terminal = terminals[term]
    terminal.wait(">>> ")
    text = "one two three " * 7_200 + "and the end"
    start = time.monotonic()
    terminal.type(form.format(text).encode() + b"\r")
    assert got(terminal) == (str(len(text)), text[-40:])
    # One key at a time it takes 100 seconds where nothing else runs.
    assert time.monotonic() - start < 40


def test_what_is_typed_during_an_answer_is_not_cut(read):
    terminal = read(pause=3)
    terminal.wait("OPEN")
    text = "word " * 1_800 + "end?"
    terminal.type(text.encode() + b"\nnext\n")
    assert got(terminal) == (str(len(text)), text[-40:])
    assert got(terminal) == ("4", "next")


def test_what_was_cut_before_the_chat_began_is_said(read):
    terminal = read(typed=b"word " * 1_800 + b"end?\n")
    assert "too long for the terminal" in terminal.wait(">>> ")
    terminal.type(b"short\r")
    assert got(terminal) == ("5", "short")
    terminal = read(typed=b"short\n")
    assert "too long" not in terminal.wait("GOT .* END")


def test_several_lines_are_one(terminals):
    terminal = terminals["xterm"]
    terminal.wait(">>> ")
    terminal.type(PASTE.format("a\tb\r\nc\n").encode() + b"\r")
    assert got(terminal) == ("6", r"a\tb\nc\n")
    terminal.wait(">>> ")
    terminal.type(b"a" + b"\x1b\r" + b"b\r")
    assert got(terminal) == ("3", r"a\nb")
    terminal.wait(">>> ")
    # A paste without marks, too, keeps its tabs.
    terminal.type(b"a\tb\r")
    assert got(terminal) == ("3", r"a\tb")


def test_ctrl_c_is_told_and_the_next_line_read(terminals):
    terminal = terminals["xterm"]
    terminal.wait(">>> ")
    terminal.type(b"half a line" + CTRL_C)
    assert got(terminal)[1] == "INTERRUPT"
    terminal.wait(">>> ")
    terminal.type(b"whole\r")
    assert got(terminal) == ("5", "whole")


def test_lines_of_earlier_times_come_back(read, tmp_path):
    file = tmp_path / "new" / "history"
    terminal = read(history=file)
    terminal.wait(">>> ")
    terminal.type(b"first\r")
    assert got(terminal)[1] == "first"
    again = read(history=file)
    again.wait(">>> ")
    again.type(UP + b"\r")
    assert got(again)[1] == "first"
    assert "first" in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600  # the user's alone


def test_without_a_place_for_it_the_history_lasts_till_the_end(read, tmp_path):
    (tmp_path / "file").write_text("")
    terminal = read(history=tmp_path / "file" / "history")
    terminal.wait(">>> ")
    terminal.type(b"first\r")
    assert got(terminal)[1] == "first"
    terminal.wait(">>> ")
    terminal.type(UP + b"\r")
    assert got(terminal)[1] == "first"
