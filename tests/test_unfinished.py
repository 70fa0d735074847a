"""mlx-dsa compress --prefill stream, killed and stopped: the same command goes on from there,
to the same file."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner
from test_compress import answer_of, ask, options, refused, run
from test_compress import folder as folder

from mlx_dsa import unfinished
from mlx_dsa.cli import main, progress
from mlx_dsa.presets import resource
from mlx_dsa.sealed import read_sealed, write_sealed

ROOT = Path(__file__).resolve().parents[1]
STREAM = ["--prefill", "stream", "--stream-chunk", 64, "--save-every", 0]
CALL = 64  # tokens a call of the model, in what runs below
GOING_ON = re.compile(r"\.part: going on after ([\d,]+) tokens\.")

# Dies, or is stopped, at the nth time that it gets to a place. It tells after each call of the
# model how many tokens were read.
RUN = f"""
import json, os, signal, sys
from mlx_dsa import unfinished
import mlx.core as mx
from mlx_dsa.cli import conversation, main

place, left, arguments = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
conversation.chunk_size = lambda: {CALL}

def reach(name):
    global left
    if name == place:
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGINT if name == "Ctrl-C" else signal.SIGKILL)

save, replace = mx.save_safetensors, os.replace
keep, remove = unfinished.UnfinishedReading.keep, unfinished.UnfinishedReading.remove

def half(path, *more):
    save(path, *more)
    size = os.path.getsize(path)
    os.truncate(path, size // 2)
    reach("half of a file written")
    save(path, *more)

def put(source, target):
    reach("before a file is in its place")
    replace(source, target)
    reach("after a file is in its place")

def kept(self, caches, done, now=False):
    print("read", done, flush=True)
    reach("after a call of the model")
    reach("Ctrl-C")
    keep(self, caches, done, now)

def removed(self):
    reach("before the part is deleted")
    remove(self)

mx.save_safetensors, os.replace = half, put
unfinished.UnfinishedReading.keep, unfinished.UnfinishedReading.remove = kept, removed
main(arguments)
"""


@pytest.fixture(autouse=True)
def short_calls(monkeypatch):
    monkeypatch.setattr("mlx_dsa.cli.conversation.chunk_size", lambda: CALL)


def arguments_for(folder, out, *more):
    words = ["compress", folder / "book.txt", "--out", out, *options(folder), *STREAM, *more]
    return [str(word) for word in words]


def compress(folder, out, *more):
    return CliRunner().invoke(main, arguments_for(folder, out, *more))


def part_of(file):
    return file.with_name(f"{file.name}.part")


def start(place, nth, arguments):
    return subprocess.run(
        [sys.executable, "-c", RUN, place, str(nth), json.dumps(arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def tokens_read(output):
    return max(map(int, re.findall(r"^read (\d+)$", output, re.M)), default=0)


def same_file(file, other):
    """Compare all arrays bit for bit, and what the headers say."""
    (arrays, header), (others, told) = map(read_sealed, (file, other))
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        if array.dtype != others[name].dtype or not mx.array_equal(array, others[name]).item():
            return False
    return header == told


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The file of a run that nothing has stopped."""
    file = tmp_path_factory.mktemp("whole") / "book.kv"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_dsa.cli.conversation.chunk_size", lambda: CALL)
        result = compress(folder, file)
    assert result.exit_code == 0, result.output
    assert not part_of(file).exists()
    return file


@pytest.mark.parametrize(
    "place, nth",
    [
        ("after a call of the model", 1),
        ("after a call of the model", 7),
        ("half of a file written", 6),
        ("before a file is in its place", 4),
        ("after a file is in its place", 9),
        ("half of a file written", -1),
        ("before a file is in its place", -1),
        ("before the part is deleted", 1),
    ],
    ids=str,
)
def test_a_killed_run_loses_a_chunk_at_most_and_ends_alike(folder, whole, tmp_path, place, nth):
    file = tmp_path / "book.kv"
    n_saved = 1 + (tokens_of(whole) - 2) // CALL  # parts, before the result
    done = start(place, nth if nth > 0 else n_saved + 1, arguments_for(folder, file))
    assert done.returncode == -signal.SIGKILL, done.stderr
    read = tokens_read(done.stdout)
    assert read > 0 and file.exists() == (place == "before the part is deleted")
    result = compress(folder, file, "--force")
    assert result.exit_code == 0, result.output
    found = GOING_ON.search(result.output)
    known = int(found[1].replace(",", "")) if found else 0
    assert read - CALL <= known <= read
    assert same_file(file, whole) and not part_of(file).exists()
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


def tokens_of(file):
    return int(read_sealed(file)[1]["tokens"])


def test_the_comparison_sees_other_entries(folder, whole, tmp_path):
    """As it would be if a part were not what was read."""
    file = tmp_path / "book.kv"
    start("after a call of the model", 8, arguments_for(folder, file))
    arrays, header = read_sealed(part_of(file))
    arrays = {name: mx.array(array) for name, array in arrays.items()}
    mx.eval(arrays)
    arrays["0.values"] = arrays["0.values"] + 0.01
    header.pop("checksum")
    write_sealed(part_of(file), arrays, header)
    assert compress(folder, file).exit_code == 0
    assert not same_file(file, whole)


@pytest.mark.parametrize("evict", ["index", "keydiff", "window"])
def test_every_rule_goes_on(folder, tmp_path, evict):
    config = tmp_path / "settings.json"
    config.write_text(json.dumps({"evict": evict, "top_k": 80}))
    more = ["--config", config]
    whole, file = tmp_path / "whole.kv", tmp_path / "book.kv"
    assert compress(folder, whole, *more).exit_code == 0
    arguments = arguments_for(folder, file, *more)
    assert start("after a call of the model", 6, arguments).returncode == -signal.SIGKILL
    assert "going on after 320 tokens" in compress(folder, file, *more).output
    assert same_file(file, whole)


def test_the_bundled_model_killed_at_some_moment_and_again(tmp_path, monkeypatch):
    monkeypatch.undo()  # its own calls
    text = (resource("prompts") / "balloon.txt").read_text(encoding="utf-8")
    book = tmp_path / "balloon.txt"
    book.write_text(text[:9000])
    whole, file = tmp_path / "whole.kv", tmp_path / "book.kv"

    def words(out):
        stream = ["--prefill", "stream", "--stream-chunk", "512", "--top-k", "128"]
        return ["compress", str(book), "--out", str(out), *stream, "--save-every", "0"]

    assert CliRunner().invoke(main, words(whole)).exit_code == 0
    program = [sys.executable, "-m", "mlx_dsa", *words(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    known = None
    for _ in range(2):
        process = subprocess.Popen(program, env=environment, stderr=subprocess.PIPE, text=True)
        # As soon as there is another part: the model is at work on the next call.
        while process.poll() is None and inode(part_of(file)) in (None, known):
            time.sleep(0.005)
        process.kill()
        process.communicate()
        known = inode(part_of(file))
    if known is not None:  # it was not faster than this
        assert "going on after" in CliRunner().invoke(main, words(file)).output
    assert same_file(file, whole)


def inode(file):
    try:
        return file.stat().st_ino, file.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def test_ctrl_c_says_how_to_go_on(folder, whole, tmp_path):
    file = tmp_path / "book.kv"
    arguments = arguments_for(folder, file)
    arguments[arguments.index("--save-every") + 1] = "1000"
    done = start("Ctrl-C", 5, arguments)
    assert done.returncode == 130, done.stderr
    # It came after the fifth call. What the next has read is written, though it was not time to.
    assert f"{part_of(file)} has the first {6 * CALL} tokens. The same command" in done.stderr
    assert "Traceback" not in done.stderr
    result = compress(folder, file)
    assert f"going on after {6 * CALL} tokens" in result.output
    assert same_file(file, whole)
    assert answer_of(ask(folder, file))


@pytest.fixture
def half_read(folder, tmp_path):
    file = tmp_path / "book.kv"
    done = start("after a call of the model", 4, arguments_for(folder, file))
    assert done.returncode == -signal.SIGKILL and part_of(file).exists()
    return file


def test_a_part_of_something_else_is_refused_or_replaced(folder, half_read, tmp_path):
    data = part_of(half_read).read_bytes()
    other = tmp_path / "other.txt"
    other.write_text("Another text of a goat. " * 40)
    words = options(folder)

    def tried(*more, file=folder / "book.txt", words=words):
        return run("compress", file, "--out", half_read, *words, *STREAM, *more)

    for result, what in (
        (tried(file=other), "another document"),
        (tried("--system", "Be short."), "another system message"),
        (tried(words=options(folder, top_k=120)), "another --top-k: 100, not 120"),
        (tried(words=options(folder, model="other-model")), "another model (weights)"),
        (tried(words=options(folder, indexer="other-indexer")), "another indexer (weights)"),
        (tried("--n-recent", 20), "another --n-recent"),
    ):
        refused(result, 1, part_of(half_read).name, what)
        assert part_of(half_read).read_bytes() == data and not half_read.exists()
    for damaged in (data[:-1], data[:100], b"", data[:-9] + b"x" + data[-8:]):
        part_of(half_read).write_bytes(damaged)
        refused(tried(), 1, part_of(half_read).name, "is damaged")
    result = tried("--force", file=other)
    assert result.exit_code == 0 and "is deleted, as --force says" in result.output
    assert half_read.exists() and not part_of(half_read).exists()


def test_other_settings_of_reading_are_refused(folder, half_read):
    words = ["compress", folder / "book.txt", "--out", half_read, *options(folder)]
    result = run(*words, "--prefill", "stream", "--stream-chunk", 32)
    refused(result, 1, "another --stream-chunk: 64, not 32")
    # What does not stream does not look at it.
    result = run(*words)
    assert result.exit_code == 0 and part_of(half_read).exists()


def test_a_template_that_tells_the_time_goes_on(folder, half_read, whole, monkeypatch):
    """What was read before the document stays, as the first run had it."""
    from mlx_dsa.template import ChatTemplate

    render = ChatTemplate._render
    monkeypatch.setattr(ChatTemplate, "_render", lambda *a, **k: "Sunday\n" + render(*a, **k))
    assert compress(folder, half_read).exit_code == 0
    assert same_file(half_read, whole)


def test_another_tokenizer_is_refused(folder, half_read, monkeypatch):
    from mlx_dsa.template import ChatTemplate

    encode = ChatTemplate.encode
    monkeypatch.setattr(ChatTemplate, "encode", lambda self, text: encode(self, text)[1:])
    refused(compress(folder, half_read), 1, "another tokenizer")


def test_what_can_not_be_written_ends_the_reading_and_keeps_what_there_is(folder, half_read, whole, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(mx, "save_safetensors", full)
        refused(compress(folder, half_read), 1, "No space left", f"{3 * CALL} tokens are kept")
    assert compress(folder, half_read).exit_code == 0
    assert same_file(half_read, whole)


class Clock:
    """Seconds that pass only where they are said to."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.mark.parametrize("every, expected", [(None, [1, 4, 7]), (0, [*range(1, 9)]), (30, [3, 6])], ids=str)
def test_writing_takes_a_small_part_of_the_time(monkeypatch, tmp_path, every, expected):
    clock, written = Clock(), []
    monkeypatch.setattr(unfinished, "time", clock)
    maker = {"settings": {}, "model": {}, "indexer": {}}
    monkeypatch.setattr(unfinished, "maker_of", lambda patch: maker)
    monkeypatch.setattr(unfinished.dataclasses, "asdict", lambda config: {})
    monkeypatch.setattr(unfinished, "pack_caches", lambda caches, where: ({}, {}))

    def write(path, arrays, header, durable):
        written.append(int(header["done"]))
        clock.now += 1

    monkeypatch.setattr(unfinished, "write_sealed", write)

    class Patch:
        config = None

    part = unfinished.UnfinishedReading(tmp_path / "part", Patch(), {}, every)
    part.begin("text", [1, 2])
    for done in range(1, 9):
        clock.now += 10
        part.keep([], done)
    assert written == expected
    part.keep([], 9, now=True)
    part.keep([], 9, now=True)  # it is there
    assert written == [*expected, 9]


def test_a_log_tells_how_much_is_read_and_how_long_it_takes(monkeypatch, capsys):
    clock = Clock()
    monkeypatch.setattr(clock, "monotonic", clock.perf_counter, raising=False)
    monkeypatch.setattr(progress, "time", clock)
    tell = progress.ReadingLines(30)
    for done in range(1000, 7001, 500):  # the first 1,000 by an earlier run
        tell(done, 7000)
        clock.now += 20
    assert capsys.readouterr().err.splitlines() == [
        f"{done:,} of 7,000 tokens read, 0:0{left // 60}:{left % 60:02} left."
        for done, left in ((2000, 200), (3000, 160), (4000, 120), (5000, 80), (6000, 40))
    ]


def test_bad_input_is_refused_before_anything_is_read(folder, tmp_path):
    file = tmp_path / "a.kv"
    words = ["compress", folder / "book.txt", "--out", file, *options(folder)]
    refused(run(*words, "--save-every", 3), 2, "--save-every has no effect without --prefill stream")
    refused(run(*words, "--prefill", "stream", "--save-every", -1), 2, "--save-every")
    part_of(file).mkdir()
    refused(run(*words, *STREAM), 1, "a.kv.part is a folder")
    refused(run("compress", "--out", file), 2, "Missing argument")


def test_a_part_file_is_no_cache(folder, tmp_path):
    out = tmp_path / "a.kv"
    start("after a call of the model", 3, arguments_for(folder, out))
    assert part_of(out).exists()
    for words in (["chat", "--prompt", "Who?"], ["info"]):
        refused(run(*words, "--cache-file", part_of(out)), 1, "half read. Run the same mlx-dsa compress")
