"""Several files, and folders, as one document."""

import os

import pytest
from click.testing import CliRunner
from local_models import write_indexers, write_model
from test_compress import refused, run

from mlx_dsa.cli.documents import read_document, tell_skipped


@pytest.fixture
def notes(tmp_path):
    """A folder with texts, and with what is none."""
    root = tmp_path / "notes"
    (root / "b" / ".hidden").mkdir(parents=True)
    (root / "b" / ".hidden" / "x.txt").write_text("Not this.")
    (root / "c.txt").write_text("\n\nThe third.\n")
    (root / "a.md").write_text("The first.")
    (root / "b" / "a.txt").write_text("The second.")
    (root / "b.png").write_bytes(b"\x89PNG\0\xff")
    (root / "empty.txt").write_text(" \n")
    (root / "latin.txt").write_bytes(b"caf\xe9")
    (root / ".env").write_text("Not this.")
    (root / ".DS_Store").write_text("Not this, and nobody asks.")
    os.mkfifo(root / "pipe")
    (root / "dead.txt").symlink_to(root / "nowhere")
    (root / "link").symlink_to(root / "b", target_is_directory=True)
    return root


WHOLE = "# a.md\n\nThe first.\n\n# b/a.txt\n\nThe second.\n\n# c.txt\n\nThe third.\n\n"


def test_a_folder_is_one_document(notes):
    document = read_document([str(notes)])
    assert document.text == WHOLE
    assert [name for name, _ in document.sections] == ["a.md", "b/a.txt", "c.txt"]
    for name, at in document.sections:
        assert document.text[at:].startswith(f"# {name}\n")
    assert document.name == "a.md and 2 more files"


def test_what_is_left_out_is_named(notes, capsys):
    document = read_document([str(notes)])
    for name, why in (
        ("b/.hidden", "is hidden"),
        (".env", "is hidden"),
        ("link", "is a link to a folder"),
        ("pipe", "is no file"),
        ("b.png", "zero bytes"),
        ("latin.txt", "not UTF-8"),
        ("empty.txt", "is empty"),
        ("dead.txt", "No such file"),
    ):
        (told,) = (line for line in document.skipped if line.startswith(f"{notes / name} "))
        assert why in told
    assert len(document.skipped) == 8
    tell_skipped(document._replace(skipped=[f"{i} is empty." for i in range(13)]))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Left out: 0 is empty." and lines[-1] == "Left out: 3 more."
    assert len(lines) == 11


def test_a_link_in_a_folder_is_no_second_file(notes):
    (notes / "b" / "latest.txt").symlink_to("a.txt")
    (notes / "0.txt").symlink_to("c.txt")  # it comes first, so its name stands
    document = read_document([str(notes)])
    assert [name for name, _ in document.sections] == ["0.txt", "a.md", "b/a.txt"]
    for name in ("b/latest.txt", "c.txt"):
        assert f"{notes / name} is there under another name." in document.skipped
    with pytest.raises(ValueError, match="a.txt is there twice"):
        read_document([str(notes / "b" / "a.txt"), str(notes / "b")])


def test_files_stand_in_their_order_under_headings(notes):
    document = read_document([str(notes / "c.txt"), str(notes / "b" / "a.txt")])
    assert document.text == "# c.txt\n\nThe third.\n\n# b/a.txt\n\nThe second.\n\n"
    both = read_document([str(notes / "b"), str(notes / "a.md")])
    assert [name for name, _ in both.sections] == ["b/a.txt", "a.md"]


def test_where_the_command_runs_changes_nothing(notes, monkeypatch):
    monkeypatch.chdir(notes / "b")
    assert read_document([".."]).text == WHOLE


def test_one_file_stays_as_it_is(notes):
    document = read_document([str(notes / "c.txt")])
    assert document == ("\n\nThe third.\n", [], [], "c.txt")


def test_what_is_written_is_no_part_of_it(notes):
    (notes / "page.html").write_text("<p>The report.")
    assert read_document([str(notes)], [notes / "page.html"]).text == WHOLE
    assert "report" in read_document([str(notes)]).text
    with pytest.raises(ValueError, match="c.txt would be written over"):
        read_document([str(notes / "c.txt")], [notes / "c.txt"])


def test_what_can_not_be_read_is_told(notes, tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "a.bin").write_bytes(b"\0")
    for paths, says in (
        ([tmp_path / "gone"], "gone cannot be read: No such file"),
        ([notes / "b.png"], "b.png cannot be read: line 1 holds"),
        ([notes / "a.md", notes / "empty.txt"], "empty.txt is empty"),
        ([tmp_path / "none"], "none holds no text file.$"),
        ([notes, tmp_path / "none"], "none holds no text file.$"),
        ([tmp_path / "binary"], "binary holds no text file. .*a.bin cannot be read: line 1"),
        ([notes / "a.md", notes / "a.md"], "a.md is there twice"),
        ([notes / "a.md", notes], "a.md is there twice"),
    ):
        with pytest.raises(ValueError, match=says):
            read_document([str(path) for path in paths])


def test_chat_and_compress_take_folders(notes, tmp_path):
    model, indexer = write_model(tmp_path / "model"), write_indexers(tmp_path / "i", retention_dim=4)
    sparse = ["--model", model, "--indexer", indexer, "--top-k", 40]
    (tmp_path / "whole.txt").write_text(WHOLE)

    def seen(*files):
        given = [word for file in files for word in ("--file", file)]
        words = ["chat", *given, "--prompt", "Who?", "--max-tokens", 2, *sparse]
        result = run(*words)
        assert result.exit_code == 0, result.output
        return result.output.partition(" tokens seen")[0].split()[-1], result.output

    assert seen(notes)[0] == seen(tmp_path / "whole.txt")[0]
    assert "Left out" in seen(notes)[1] and "The third" not in seen(notes)[1]
    told = run("compress", notes, "--out", notes / "n.kv", *sparse)
    assert told.exit_code == 0 and "Left out: 0" not in told.output
    assert "of a.md and 2 more files" in run("info", "--cache-file", notes / "n.kv").output
    (tmp_path / "none").mkdir()
    out = tmp_path / "a.kv"
    refused(run("compress", tmp_path / "none", "--out", out, *sparse), 1, "holds no text file")
    refused(run("compress", notes / "a.md", "--out", notes / "a.md", "--force"), 1, "written over")
    assert (notes / "a.md").read_text() == "The first."


def test_prompts_of_generate_have_no_headings(notes, tmp_path):
    """There a file is a part of the prompt."""
    result = CliRunner().invoke(__import__("mlx_dsa.cli").cli.main, ["generate", "--file", str(notes)])
    assert result.exit_code == 1 and "Is a directory" in result.output
