"""mlx-dsa compress, and chat --cache-file: read once, asked often, or refused in one line."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner
from local_models import write_indexers, write_model

from mlx_dsa.cli import main

ROOT = Path(__file__).resolve().parents[1]
TOLD = re.compile(
    r"([\d,]+) tokens read in [\d.]+ s, ([\d,]+) entries kept a layer, [\d.]+ MB "
    r"\(dense [\d.]+ MB\)\. It loads in [\d.]+ s\."
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model that says something else each time, indexers, and a document."""
    root = tmp_path_factory.mktemp("local")
    for seed, name in enumerate(("model", "other-model")):
        mx.random.seed(seed)
        write_model(root / name, tie_word_embeddings=False)
    for seed, name in enumerate(("indexer", "other-indexer")):
        mx.random.seed(seed)
        write_indexers(root / name, retention_dim=4)
    lines = (f"Line {i} tells of {i * i} sheep and a goat." for i in range(60))
    (root / "book.txt").write_text(" ".join(lines))
    return root


def options(folder, model="model", indexer="indexer", top_k=100):
    return ["--model", folder / model, "--indexer", folder / indexer, "--top-k", top_k]


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def compress(folder, out, *more):
    return run("compress", folder / "book.txt", "--out", out, *options(folder), *more)


def ask(folder, file, *more, **changes):
    question = ["--prompt", "How many sheep?", "--max-tokens", 12]
    return run("chat", "--cache-file", file, *question, *options(folder, **changes), *more)


def refused(result, code, *words):
    errors = [line for line in result.output.splitlines() if line.startswith("Error")]
    assert result.exit_code == code, (result.output, result.exception)
    assert len(errors) == 1 and "Traceback" not in result.output
    for word in words:
        assert word in errors[0]


def answer_of(result):
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


@pytest.fixture(scope="module")
def book(folder, tmp_path_factory):
    file = tmp_path_factory.mktemp("saved") / "book.kv"
    result = compress(folder, file)
    assert result.exit_code == 0, result.output
    seen, kept = TOLD.search(result.output).groups()
    assert int(seen.replace(",", "")) > 600 and kept == "100"
    return file


def test_a_saved_document_is_asked_often(folder, book):
    before = book.read_bytes()
    first, again = ask(folder, book), ask(folder, book)
    assert "100 entries kept a layer" in first.output
    assert answer_of(first) == answer_of(again) != ""
    assert book.read_bytes() == before


def test_nothing_evicted_is_as_if_the_document_had_just_been_read(folder, tmp_path):
    full = ["--cache", "full", "--prefill", "exact"]
    assert compress(folder, tmp_path / "full.kv", *full).exit_code == 0
    saved = ask(folder, tmp_path / "full.kv", *full)
    question = ["--prompt", "How many sheep?", "--max-tokens", 12]
    document = ["--file", folder / "book.txt"]
    read = run("chat", *document, *question, *options(folder), *full)
    assert answer_of(saved) == answer_of(read) != ""


def test_other_models_indexers_and_settings_are_refused(folder, book):
    refused(ask(folder, book, model="other-model"), 1, "other model weights")
    refused(ask(folder, book, indexer="other-indexer"), 1, "other indexer weights")
    refused(ask(folder, book, top_k=120), 1, "--top-k 120", "made with 100")
    refused(ask(folder, book, "--cache", "full"), 1, "--cache full", "made with budget")


def test_damaged_and_foreign_files_are_refused(folder, book, tmp_path):
    data = book.read_bytes()
    for name, content in {
        "short": data[: len(data) // 2],
        "head": data[:4],
        "empty": b"",
        "text": (folder / "book.txt").read_bytes(),
        "model": (folder / "model" / "model.safetensors").read_bytes(),
    }.items():
        file = tmp_path / f"{name}.kv"
        file.write_bytes(content)
        refused(ask(folder, file), 1, file.name)
    refused(ask(folder, tmp_path / "none.kv"), 1, "there is no file")


def test_a_file_that_is_there_is_not_overwritten(folder, book):
    before = book.read_bytes()
    refused(compress(folder, book), 2, "--force")
    assert book.read_bytes() == before
    assert compress(folder, book, "--force").exit_code == 0
    assert answer_of(ask(folder, book))


def test_what_could_not_be_saved_is_refused_before_it_is_read(folder, tmp_path):
    tiered = compress(folder, tmp_path / "a.kv", "--cache", "tiered")
    refused(tiered, 2, "can't be saved")
    refused(compress(folder, tmp_path, "--force"), 1, "is a folder")
    assert not list(tmp_path.iterdir())
    assert compress(folder, tmp_path / "new" / "a.kv").exit_code == 0


def test_a_folder_that_takes_no_file_is_told_before_anything_is_read(folder, tmp_path):
    # For root no folder is read-only, but no process makes files in /proc.
    closed = Path("/proc") if os.geteuid() == 0 else tmp_path / "closed"
    if closed.parent == tmp_path:
        closed.mkdir(mode=0o500)
    told = run("compress", folder / "no-book.txt", "--out", closed / "a.kv", *options(folder))
    refused(told, 1, f"{closed / 'a.kv'} can't be written", "another folder")


KILLED = """
import json, os, signal, sys
import mlx.core as mx
from mlx_dsa.cli import main

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

save = mx.save_safetensors

def half(path, *arguments):
    save(path, *arguments)
    os.truncate(path, os.path.getsize(path) // 2)
    die()

if sys.argv[1] == "half written":
    mx.save_safetensors = half
else:
    os.replace = die
main(json.loads(sys.argv[2]))
"""


@pytest.mark.parametrize("when", ["half written", "not yet in its place"])
def test_a_kill_while_saving_leaves_the_old_file(folder, book, when):
    before = book.read_bytes()
    arguments = ["compress", folder / "book.txt", "--out", book, "--force"]
    arguments = json.dumps([str(a) for a in (*arguments, *options(folder, top_k=120))])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, when, arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert book.read_bytes() == before
    assert answer_of(ask(folder, book))


def test_chat_tells_what_a_cold_store_costs(folder, tmp_path):
    question = ["--file", folder / "book.txt", "--prompt", "How many?", "--max-tokens", 8]
    told = {}
    for name, more in {
        "8": [], "4": ["--cold-bits", 4], "16": ["--cold-bits", 16],
        "file": ["--cold", tmp_path / "cold"],
    }.items():  # fmt: skip
        result = run("chat", *question, *options(folder), "--cache", "tiered", *more)
        assert result.exit_code == 0, result.output
        found = re.search(r"cold ([\d,]+) B a token, ([\d.]+) entries recalled", result.output)
        told[name] = int(found[1].replace(",", ""))
        assert 0 < float(found[2]) < 100
    # 2 layers of 2 heads of 32 numbers for keys and for values, in float32 or with a scale
    # and a bias for each 32.
    numbers = 2 * 2 * 2 * 32
    assert told["16"] == told["file"] == 4 * numbers
    assert told["8"] == numbers + 8 * numbers // 32
    assert told["4"] == numbers // 2 + 8 * numbers // 32
    wrong = run("chat", *question, *options(folder), "--cold-bits", 4)
    refused(wrong, 1, "for cache 'tiered' only")
    refused(run("chat", "--dense", "--cold-bits", 4, "--prompt", "a"), 2, "--cold-bits")
