"""The commands, run in this process on a small random model."""

import json
import os
import re
import shlex
import shutil
import signal
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from click.testing import CliRunner
from local_models import write_indexers, write_model

from mlx_dsa.cli import conversation, main
from mlx_dsa.cli.documents import read_texts
from mlx_dsa.cli.stats import Cold, Report, describe
from mlx_dsa.machine import runs_float32
from mlx_dsa.presets import resource
from mlx_dsa.train import (
    LayerScore,
    RetentionConfig,
    RetentionScore,
    TrainConfig,
    TrainProgress,
    TrainResult,
)

train_module = sys.modules["mlx_dsa.cli.train"]  # cli.train is the command
COMMANDS = ("chat", "demo", "generate", "info", "train")
REPORT = re.compile(
    r"([\d,]+) tokens seen · ([\d,]+) entries kept a layer · "
    r"KV [\d.]+ MB \(dense [\d.]+ MB\) · [\d.,]+ tokens/s · first token [\d.]+ s"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("local")
    return str(write_model(root / "model")), str(write_indexers(root / "indexer"))


@pytest.fixture(scope="module")
def sparse(folders):
    """Options that name the small model and its indexers."""
    return ["--model", folders[0], "--indexer", folders[1]]


def run(*arguments, given=""):
    return CliRunner().invoke(main, [str(a) for a in arguments], input=given)


def refused(result, code, *words):
    """Check for one line of error, an exit code, and no traceback."""
    errors = [line for line in result.output.splitlines() if line.startswith("Error")]
    assert result.exit_code == code, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert len(errors) == 1 and result.output.rstrip().endswith(errors[0])
    assert "Traceback" not in result.output
    for word in words:
        assert word in errors[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    result = run(command, "--help")
    assert result.exit_code == 0 and result.output.startswith("Usage")


def test_version():
    assert run("--version").output.startswith("mlx-dsa, version ")


# chat


def test_chat_answers_a_prompt_and_reports(sparse):
    result = run("chat", *sparse, "--prompt", "Who?", "--max-tokens", 5)
    assert result.exit_code == 0, result.output
    assert len(REPORT.findall(result.output)) == 1


def test_chat_keeps_its_cache_over_turns(sparse):
    lines = "Who?\nAnd then?\n\n/reset\nWho?\n/exit\nnever asked\n"
    result = run("chat", *sparse, "--max-tokens", 5, given=lines)
    assert result.exit_code == 0, result.output
    seen = [int(m[0].replace(",", "")) for m in REPORT.findall(result.output)]
    assert len(seen) == 3
    assert seen[0] < seen[1] and seen[2] == seen[0]


def test_chat_bounds_what_it_keeps(sparse, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("A line of plain text. " * 60)
    result = run(
        "chat", *sparse, "--top-k", 100, "--file", file, "--prompt", "What is it?",
        "--max-tokens", 5,
    )  # fmt: skip
    seen, kept = REPORT.findall(result.output)[0]
    assert int(seen) > 300 and int(kept) == 100


def test_chat_goes_on_after_a_prompt_when_interactive(sparse):
    result = run(
        "chat", *sparse, "--prompt", "Who?", "--interactive", "--max-tokens", 3,
        given="And?\n",
    )  # fmt: skip
    assert len(REPORT.findall(result.output)) == 2


def test_chat_dense(folders):
    result = run("chat", "--model", folders[0], "--dense", "--prompt", "Who?", "--max-tokens", 3)
    assert result.exit_code == 0, result.output
    assert "entries kept a layer" in result.output and "(dense" not in result.output


def test_chat_says_what_it_runs(sparse, folders):
    output = run("chat", *sparse, "--top-k", 100, "--prompt", "x", "--max-tokens", 2).stderr
    assert f"{folders[0]}: top_k 100, cache budget" in output
    dense = run("chat", "--model", folders[0], "--dense", "--prompt", "x", "--max-tokens", 2)
    assert f"{folders[0]}: dense" in dense.stderr


@pytest.mark.parametrize("word", ["/exit", "/quit", "exit", "quit", "QUIT", "/Exit"])
def test_chat_is_left_with_a_word(word, sparse):
    result = run("chat", *sparse, "--max-tokens", 2, given=f"Who?\n{word}\nnever asked\n")
    assert result.exit_code == 0 and len(REPORT.findall(result.output)) == 1


def test_chat_knows_its_commands(sparse):
    lines = "/help\n/nosuch\n/etc/hosts holds what?\nexit where?\n"
    result = run("chat", *sparse, "--max-tokens", 2, given=lines)
    assert len(REPORT.findall(result.output)) == 2
    for words in ("/reset", "/exit", "Ctrl-C", "There is no /nosuch. /help names"):
        assert result.stderr.count(words) == 1


def test_a_prompt_is_no_command(sparse):
    result = run("chat", *sparse, "--prompt", "/exit", "--max-tokens", 2)
    assert len(REPORT.findall(result.output)) == 1


def test_what_cuts_an_answer_is_said(sparse, monkeypatch):
    for command in ("chat", "generate"):
        result = run(command, *sparse, "--prompt", "Who?", "--max-tokens", 5)
        assert "Cut after 5 tokens, as --max-tokens says." in result.stderr
    monkeypatch.setattr("mlx_dsa.cli.session.make_sampler", lambda temp: END)
    result = run("generate", *sparse, "--prompt", "Who?", "--max-tokens", 5)
    assert REPORT.search(result.output) and "Cut" not in result.output


def END(logprobs):
    """Draw the end mark of the bundled tokenizer."""
    return mx.array([2])


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_no_file_of_several_is_lost(command, sparse, tmp_path):
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, n in zip(files, (40, 90)):
        file.write_text("A line of plain text. " * n)
    question = ["--prompt", "Who?"] if command == "chat" else []

    def seen(*names):
        given = [part for name in names for part in ("--file", name)]
        result = run(command, *sparse, *given, *question, "--max-tokens", 2)
        return int(REPORT.search(result.output)[1].replace(",", ""))

    first, second = seen(files[0]), seen(files[1])
    assert seen(*files) > max(first, second) + 100
    assert seen(*files[::-1]) > max(first, second) + 100


def test_files_stand_in_their_order(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(f"Text {name}.")
    assert read_texts([tmp_path / "b", tmp_path / "a"]) == "Text b.\n\nText a."


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfText")
    assert read_texts([tmp_path / "a"]) == "Text"


def test_several_prompts_are_asked_in_order(sparse):
    prompts = ["--prompt", "Who?", "--prompt", "And then?"]
    result = run("chat", *sparse, *prompts, "--max-tokens", 2)
    seen = [int(m[0]) for m in REPORT.findall(result.output)]
    assert len(seen) == 2 and seen[0] < seen[1]
    refused(run("generate", *sparse, *prompts), 2, "--prompt is given twice")


def test_a_line_that_is_no_text_does_not_end_the_chat(sparse):
    lines = b"\xef\xbb\xbfWho?\ncaf\xe9\n\xed\xa0\xbd\nzero \0\nAnd?\n"
    result = run("chat", *sparse, "--max-tokens", 2, given=lines)
    assert result.exit_code == 0 and len(REPORT.findall(result.output)) == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert [e.partition(" of ")[0] for e in errors] == [f"Error: Line {n}" for n in (2, 3, 4)]


def test_a_line_without_positions_does_not_end_the_chat(sparse):
    lines = "Who?\n" + "word " * 9_000 + "\nAnd?\n"
    result = run("chat", *sparse, "--max-tokens", 2, given=lines)
    assert result.exit_code == 0 and len(REPORT.findall(result.output)) == 2
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert "8,192 positions" in error and "/reset forgets it" in error


@pytest.mark.parametrize("command", ["chat", "generate", "demo", "compress"])
def test_a_file_without_positions_is_refused(command, sparse, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("word " * 9_000)
    given = {
        "demo": ["--file", file, "--prompt", "Who?"],
        "compress": [file, "--out", tmp_path / "a.kv"],
    }.get(command, ["--file", file])
    refused(run(command, *sparse, *given, given="Who?\n"), 1, "8,192 positions")


@pytest.mark.parametrize("option", ["--prompt", "--system"])
@pytest.mark.parametrize("text", ["caf\udce9", "half \ud83d of one"])
def test_an_option_that_is_no_text_is_refused(option, text, sparse):
    prompt = ["--prompt", "Who?"] if option == "--system" else []
    refused(run("chat", *sparse, option, text, *prompt), 1, "not UTF-8 text")
    if option == "--prompt":
        for command in ("generate", "demo"):
            refused(run(command, *sparse, option, text), 1, "not UTF-8 text")


def test_standard_input_that_is_no_text_is_refused(sparse):
    refused(run("generate", *sparse, given=b"caf\xe9"), 1, "Standard input is not UTF-8")


def test_without_standard_input_there_is_nothing_to_ask(sparse, monkeypatch):
    monkeypatch.setattr(CliRunner, "invoke", invoke_without_stdin)
    assert run("chat", *sparse).exit_code == 0
    refused(run("generate", *sparse), 1, "must not be empty")


def invoke_without_stdin(self, command, arguments, input):
    with self.isolation() as (output, errors, mixed):
        sys.stdin = None
        with pytest.raises(SystemExit) as left:
            command.main(arguments)
        text = mixed.getvalue().decode()
    return SimpleNamespace(exit_code=left.value.code, output=text, exception=left.value)


@pytest.mark.parametrize("option", ["--think", "--no-think"])
def test_thinking_that_cannot_be_told_is_refused(option, sparse):
    words = f"{option} has no effect: this model's chat template"
    refused(run("chat", *sparse, option, "--prompt", "x"), 1, words)
    refused(run("generate", *sparse, option, "--prompt", "x"), 1, words)
    refused(run("generate", *sparse, option, "--raw", "--prompt", "x"), 2, "with --raw")


@pytest.mark.parametrize("broken", ["{", "[]", '{"model": 3}', '{"added_tokens": null}', ""])
def test_a_broken_tokenizer_is_refused(broken, sparse, tmp_path):
    model = write_model(tmp_path / "model")
    (model / "tokenizer.json").write_text(broken)
    result = run("chat", "--model", model, "--indexer", sparse[3], "--prompt", "x")
    refused(result, 1, "cannot load the model", str(model))


def test_figures_are_broken_between_two():
    for digits in range(1, 9):
        n = int("987654321"[:digits])
        report = Report(n, (n, n + 1), n, n, n, n / 3, n, n / 3, n / 7, 1.0, Cold(n, n / 7))
        text = describe(report)
        for width in (60, 79, 80, 81, 120):
            lines = describe(report, width=width).split("\n")
            assert " ".join(lines) == text and max(map(len, lines)) <= width
            assert all(not line[0].isalpha() or line[:2] in ("KV", "co", "fi") for line in lines)
        assert len(text) > 80 or digits < 3


# Ctrl-C


def press_ctrl_c(monkeypatch, name):
    """Press Ctrl-C after the first step of mlx-lm's loop."""
    inner = getattr(conversation, name)

    def pressed(*arguments, **options):
        for step in inner(*arguments, **options):
            os.kill(os.getpid(), signal.SIGINT)
            yield step
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(conversation, name, pressed)


@pytest.mark.parametrize("command", ["chat", "piped chat", "generate", "compress", "demo"])
def test_ctrl_c_is_exit_130_everywhere(command, sparse, tmp_path, monkeypatch):
    file = tmp_path / "text.txt"
    file.write_text("A line of plain text. " * 60)
    loop = "generate_step" if command == "compress" else "stream_generate"
    press_ctrl_c(monkeypatch, loop)
    given = {
        "compress": [file, "--out", tmp_path / "a.kv"],
        "piped chat": ["--file", file],
    }.get(command, ["--prompt", "Who?"])
    result = run(command.split()[-1], *sparse, *given, given="Who?\nAnd?\n")
    assert result.exit_code == 130, result.output
    assert "Traceback" not in result.output and len(REPORT.findall(result.output)) <= 1
    assert not (tmp_path / "a.kv").exists()


# generate


def test_generate_takes_a_prompt_a_file_or_standard_input(sparse, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("Once upon a time")
    options = ["generate", *sparse, "--max-tokens", 5]
    outputs = [
        run(*options, "--prompt", "Once upon a time"),
        run(*options, "--file", file),
        run(*options, given="Once upon a time"),
    ]
    answers = {result.stdout.splitlines()[0] for result in outputs}
    assert len(answers) == 1
    assert all(REPORT.search(result.output) for result in outputs)


def test_generate_raw_adds_no_template(sparse):
    options = ["generate", *sparse, "--max-tokens", 1, "--prompt", "word"]
    chat, raw = run(*options), run(*options, "--raw")
    seen = [int(REPORT.search(r.output)[1]) for r in (chat, raw)]
    assert seen[1] < seen[0]


def test_generate_is_repeatable_with_a_seed(sparse):
    options = ["generate", *sparse, "--max-tokens", 8, "--prompt", "x", "--temp", 1]
    first, again, other = (run(*options, "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.skipif(not runs_float32(), reason="only on the CPU of a Linux machine")
@pytest.mark.parametrize("found", [True, False])
def test_openblas_is_hinted_at_where_it_is_missing(found, monkeypatch, sparse):
    monkeypatch.setattr("mlx_dsa.blas.preload", lambda: found)
    output = run("generate", *sparse, "--prompt", "x", "--max-tokens", 1).output
    assert output.count("OpenBLAS is not on this machine") == (0 if found else 1)


# What is refused


@pytest.mark.parametrize(
    "options",
    [
        ["--dense", "--top-k", 100],
        ["--dense", "--cache", "full"],
        ["--dense", "--prefill", "tile"],
        ["--dense", "--indexer", "x"],
        ["--seed", 1],
        ["--preset", "huge"],
        ["--max-tokens", 0],
        ["--temp", -1],
        ["--cache", "some"],
        ["--nosuch"],
    ],
    ids=str,
)
def test_a_wrong_command_line_is_exit_2(options):
    refused(run("chat", "--prompt", "x", *options), 2)


def test_generate_refuses_two_prompts():
    refused(run("generate", "--prompt", "x", "--file", "y"), 2, "exclude each other")


@pytest.mark.parametrize("command", ["chat", "generate", "demo"])
@pytest.mark.parametrize("prompt", ["", " \n "])
def test_an_empty_prompt_is_refused(command, prompt, sparse):
    refused(run(command, *sparse, "--prompt", prompt), 1, "must not be empty")


def test_empty_standard_input_is_refused(sparse):
    refused(run("generate", *sparse, given=""), 1, "must not be empty")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"\x89PNG\r\n\x1a\n\x00\xff", "line 1 holds bytes that are not UTF-8"),
        (b"ab\x00cd", "line 1 holds zero bytes"),
        (b" \n", "is empty"),
        (None, "No such file"),
    ],
)
@pytest.mark.parametrize("command", ["chat", "generate"])
def test_a_file_that_is_not_text_is_refused(command, content, words, sparse, tmp_path):
    file = tmp_path / "file.bin"
    if content is not None:
        file.write_bytes(content)
    refused(run(command, *sparse, "--file", file), 1, words, str(file))


def test_a_folder_as_file_is_refused(sparse, tmp_path):
    refused(run("generate", *sparse, "--file", tmp_path), 1, "Is a directory")


@pytest.mark.parametrize("top_k", [0, -3, 5])
def test_a_top_k_too_small_is_refused(top_k, sparse):
    result = run("chat", *sparse, "--prompt", "x", "--top-k", top_k)
    refused(result, 1, "--top-k must be ", str(top_k))


def test_indexers_that_are_missing_are_refused(folders):
    options = ["chat", "--prompt", "x", "--model", folders[0]]
    refused(run(*options), 1, "no indexers are known", "--dense")
    refused(run(*options, "--indexer", "./none.safetensors"), 1, "none.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9])
def test_a_truncated_indexer_file_is_refused(share, folders, tmp_path):
    folder = write_indexers(tmp_path / "indexer")
    file = folder / "indexers.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    result = run("chat", "--prompt", "x", "--model", folders[0], "--indexer", file)
    refused(result, 1, str(file))


def test_indexers_of_another_width_are_refused(folders, tmp_path):
    other = write_indexers(tmp_path / "indexer", dim=96)
    result = run("chat", "--prompt", "x", "--model", folders[0], "--indexer", other)
    refused(result, 1, "another model", "96")


def test_a_model_that_cannot_be_patched_is_refused(tmp_path):
    model = tmp_path / "model"
    write_model(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "nosuch"}))
    indexer = write_indexers(tmp_path / "indexer")
    result = run("chat", "--prompt", "x", "--model", model, "--indexer", indexer)
    refused(result, 1, "nosuch")


@pytest.mark.parametrize("text, word", [('{"topk": 3}', "topk"), ("nothing", "not JSON"), (None, "No such")])
def test_a_wrong_settings_file_is_refused(text, word, tmp_path):
    file = tmp_path / "settings.json"
    if text is not None:
        file.write_text(text)
    refused(run("chat", "--prompt", "x", "--config", file), 1, word, str(file))


def test_another_error_is_not_hidden(monkeypatch, sparse):
    def broken(*arguments, **options):
        raise KeyError("a mistake of ours")

    monkeypatch.setattr("mlx_dsa.cli.session.load_settings", broken)
    result = run("chat", *sparse, "--prompt", "x")
    assert isinstance(result.exception, KeyError)


# info


def test_info_tells_what_would_run(sparse, folders):
    result = run("info", *sparse)
    assert result.exit_code == 0, result.output
    for words in (*folders, "2 layers", "parameters a layer", "top_k 2048", "tiny"):
        assert words in result.output


@pytest.mark.parametrize(
    "dims, words",
    [
        ((4, 4), "with retention heads"),
        ((0, 0), "without retention heads: train --retention adds them"),
    ],
)
def test_info_tells_whether_indexers_have_retention_heads(dims, words, folders, tmp_path):
    indexer = write_indexers(tmp_path / "i", retention_dim=dims[0])
    assert f", {words})" in run("info", "--model", folders[0], "--indexer", indexer).output


@pytest.mark.parametrize("dense", [[], ["--dense"]])
def test_info_sees_indexers_in_the_models_folder(dense, tmp_path):
    folder = write_model(tmp_path / "model")
    assert ("none known" in run("info", "--model", folder, *dense).output) != bool(dense)
    write_indexers(folder)
    text = run("info", "--model", folder, *dense).output
    assert (f"{folder / 'indexers.safetensors'} (2 layers" in text) != bool(dense)


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "--prompt", "x", "--max-tokens", 1],
        ["chat", "--prompt", "x", "--max-tokens", 1],
        ["demo", "--prompt", "x"],
        ["compress", "TEXT", "--out", "OUT"],
        ["eval", "memory", "--lengths", 64, "--top-k", 32],
        ["bench", "--contexts", 32, "--steps", 1, "--repeats", 1],
        ["train", "--retention", "--data", "TEXT", "--out", "OUT", "--steps", 1],
    ],
    ids=lambda words: words[0],
)
def test_every_command_sees_indexers_in_the_models_folder(command, trained, tmp_path):
    folder = write_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("A line of text. " * 99)
    places = {"TEXT": tmp_path / "text.txt", "OUT": tmp_path / "out"}
    words = [places.get(word, word) for word in command]
    refused(run(*words, "--model", folder), *((2,) if command[0] == "train" else (1,)), "ndexer")
    write_indexers(folder)
    result = run(*words, "--model", folder)
    assert result.exit_code == 0, result.output


def test_info_knows_the_model_of_a_preset():
    named, preset = (
        run("info", *words).output for words in (["--model", "mlx-community/Qwen3-8B-4bit"], ["--preset", "qwen3-8b"])
    )
    assert "rp440/" in named and "256 recent" in named and named == preset


def test_command_line_over_file_over_preset(tmp_path, folders):
    file = tmp_path / "settings.json"
    settings = {"model": folders[0], "indexer": folders[1], "top_k": 300, "cache": "full"}
    file.write_text(json.dumps(settings))
    options = ["info", "--preset", "tiny", "--config", file]
    text = run(*options).output
    assert "top_k 300" in text and "cache full" in text and "128 recent" in text
    assert "top_k 111, cache full" in run(*options, "--top-k", 111).output
    # Without a preset a model of one's own gets the defaults.
    assert "64 recent" in run("info", "--config", file).output


def test_info_fetches_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    result = run("info", "--preset", "qwen3-8b")
    assert result.exit_code == 0, result.output
    assert result.output.count("not on this machine; fetched when first used") == 2
    assert "none known" in run("info", "--preset", "qwen3-4b").output


def test_info_refuses_a_path_that_is_not_there():
    refused(run("info", "--model", "./nowhere"), 1, "./nowhere")


# train


def test_every_training_setting_is_an_option():
    assert list(train_module.HELP) == [f.name for f in fields(TrainConfig)]
    heads = [f.name for f in fields(RetentionConfig) if f.name not in train_module.HELP]
    assert list(train_module.RETENTION_HELP) == heads
    for field in fields(RetentionConfig):  # one default is shown for both
        if field.name in train_module.HELP:
            assert field.default == getattr(TrainConfig, field.name)


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Stand in for the trainer and note how it was called."""
    calls = []

    def train_indexers(model, tokenizer, data, out, config, *, resume, progress):
        calls.append((data, out, config, resume))
        score = LayerScore(loss=1.0, recall=0.5, mass=0.75, best_mass=0.9)
        progress(TrainProgress(1, 2, 1.5, 1e-3, 10, 0.1, None))
        progress(TrainProgress(2, 2, 1.4, 1e-3, 20, 0.2, {0: score}))
        return TrainResult(tmp_path / "out" / "indexers.safetensors", {0: 2}, {0: score})

    def train_retention(model, tokenizer, data, out, config, *, indexers, resume, progress):
        calls.append((data, out, config, indexers, resume))
        score = RetentionScore(loss=1.0, agreement_16=0.5, agreement_8=0.75)
        progress(TrainProgress(2, 2, 1.4, 1e-3, 20, 0.2, {0: score}))
        (tmp_path / "heads").mkdir(exist_ok=True)
        source = Path(indexers) if Path(indexers).is_dir() else Path(indexers).parent
        shutil.copy(source / "run_config.json", tmp_path / "heads")
        return TrainResult(tmp_path / "heads" / "indexers.safetensors", {0: 2}, {0: score})

    monkeypatch.setattr(train_module, "train_indexers", train_indexers)
    monkeypatch.setattr(train_module, "train_retention", train_retention)
    return calls


def test_train_passes_its_options_on(trained, folders, tmp_path):
    file, out = tmp_path / "train.json", tmp_path / "runs"
    file.write_text(json.dumps({"steps": 9, "seed": 3}))
    out.mkdir()
    (out / "checkpoint.safetensors").write_text("")
    result = run(
        "train", "--model", folders[0], "--data", "text.txt", "--out", out, "--resume",
        "--config", file, "--steps", 2, "--learning-rate", 0.01,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    config = TrainConfig(steps=2, seed=3, learning_rate=0.01)
    assert trained == [("text.txt", str(out), config, True)]
    assert "recall@K 0.500, mass@K 0.750" in result.output
    assert f"Wrote {tmp_path / 'out' / 'indexers.safetensors'}" in result.output


def test_train_retention_passes_its_options_on(trained, folders):
    model, indexer = folders
    options = ["train", "--data", "text.txt", "--out", "runs", "--retention", "--model", model]
    result = run(*options, "--indexer", indexer, "--steps", 2, "--repeat-share", 0.25)
    assert result.exit_code == 0, result.output
    config = RetentionConfig(steps=2, repeat_share=0.25)
    assert trained == [("text.txt", "runs", config, Path(indexer), False)]
    assert "rank agreement at 1/16 0.500, at 1/8 0.750" in result.output
    refused(run(*options), 2, "--retention needs --indexer")
    refused(run(*options, "--indexer", indexer, "--top-k", 9), 2, "without --retention")
    refused(run(*options, "--indexer", "./nowhere"), 1, "./nowhere")
    assert len(trained) == 1


def test_train_refuses_wrong_options(trained, folders, tmp_path):
    options = ["train", "--data", "x", "--out", "y", "--model", folders[0]]
    refused(run(*options, "--steps", 0), 1, "--steps must be")
    refused(run(*options, "--top-k", 8192), 1, "--sequence-length must exceed --top-k")
    refused(run(*options, "--preset", "tiny"), 2, "exclude each other")
    refused(run(*options, "--repeat-share", 0.1), 2, "with --retention")
    refused(run(*options, "--indexer", "x"), 2, "goes with --retention")
    refused(run("train", "--out", "y"), 2, "--data")
    assert not trained


@pytest.mark.parametrize("there", [None, "folder", "notes.txt"])
def test_train_resumes_only_what_was_begun(there, trained, folders, tmp_path):
    out = tmp_path / "runs"
    if there:
        out.mkdir()
    if there == "notes.txt":
        (out / there).write_text("kept")
    options = ["train", "--data", "x", "--out", out, "--model", folders[0]]
    refused(run(*options, "--resume"), 2, f"no run in {out} to go on with", "--resume")
    assert not trained
    (out if there else tmp_path).joinpath("indexers.safetensors").write_text("")
    done = out if there else tmp_path
    refused(run(*options[:4], done, *options[5:], "--resume"), 1, "finished indexers")


@pytest.mark.parametrize("begun", [True, False])
def test_train_says_that_it_can_go_on_where_it_can(begun, monkeypatch, folders, tmp_path):
    def stops(model, tokenizer, data, out, *arguments, **options):
        if begun:
            Path(out).mkdir()
            (Path(out) / "checkpoint.safetensors").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "train_indexers", stops)
    result = run("train", "--data", "x", "--out", tmp_path / "new", "--model", folders[0])
    assert result.exit_code == 130 and "Stopped." in result.output
    assert ("--resume goes on" in result.output) == begun


@pytest.mark.parametrize(
    "trained_so, settings",
    [
        ((), "top_k 2048, cache budget, prefill auto, 4 sinks, 64 recent"),
        (("--top-k", 128), "top_k 128, cache budget, prefill auto, 4 sinks, 64 recent"),
        (("--top-k", 40, "--n-recent", 32), "top_k 40, cache budget, prefill auto, 4 sinks, 32 re"),
        (("--top-k", 256, "--n-recent", 100), "top_k 256, cache budget, prefill auto, 4 sinks, 100"),
        (("--top-k", 1, "--n-sink", 0, "--n-recent", 0), "top_k 5, cache budget, prefill auto, 4 sinks, 1 "),
    ],
    ids=str,
)  # fmt: skip
def test_train_suggests_a_chat_that_fits(trained_so, settings, trained, tmp_path):
    model = write_model(tmp_path / "my model")
    result = run("train", "--model", model, "--data", "x", "--out", tmp_path / "new", *trained_so)
    assert result.exit_code == 0, result.output
    last = result.output.splitlines()[-1]
    assert last.startswith("Try: mlx-dsa chat --model ")
    write_indexers(tmp_path / "out")
    told = run("info", *shlex.split(last)[3:]).output
    assert settings in told and str(tmp_path / "out") in told


def test_train_tells_the_sinks_that_no_option_can(trained, folders, tmp_path):
    result = run("train", "--model", folders[0], "--data", "x", "--out", tmp_path / "new", "--n-sink", 9)
    assert result.output.splitlines()[-1] == 'with {"n_sink": 9} in a --config file.'


def test_train_suggests_what_the_indexers_beside_heads_were_trained_for(trained, folders, tmp_path):
    options = ["--model", folders[0], "--indexer", folders[1], "--data", "x", "--retention"]
    result = run("train", *options, "--out", tmp_path / "a")
    assert "--top-k 2048" in result.output and "--n-recent" not in result.output
    result = run("train", *options, "--out", tmp_path / "b", "--min-distance", 100)
    assert "--top-k 2048 --n-recent 100" in result.output
    file = write_indexers(tmp_path / "indexer") / "run_config.json"
    known = {**json.loads(file.read_text()), "train": {"top_k": 96, "n_recent": 40}}
    file.write_text(json.dumps(known))
    options[3] = file.parent
    result = run("train", *options, "--out", tmp_path / "c")
    assert result.output.splitlines()[-1].endswith("--top-k 96")


# demo


def test_demo_compares_own_prompts(sparse):
    result = run("demo", *sparse, "--prompt", "Who?", "--interactive", given="And?\n")
    assert result.exit_code == 0, result.output
    assert result.output.count("dense") == result.output.count("KV memory") == 2


@pytest.mark.parametrize(
    "options, names",
    [
        ([], ["sparse, all kept", "sparse, budget"]),
        (["--cache", "full"], ["sparse, all kept"]),
        (["--cache", "budget"], ["sparse, budget"]),
        (["--cache", "tiered"], ["sparse, rest cold"]),
        (["--cache", "tiered", "--cold-bits", "4"], ["sparse, rest cold"]),
        (["--config", {"cache": "tiered", "cold_bits": 4}], ["sparse, rest cold"]),
        (["--config", {"cache": "full"}], ["sparse, all kept", "sparse, budget"]),
    ],
    ids=str,
)
def test_demo_shows_the_cache_that_is_named(options, names, sparse, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(options[-1] if options else {}))
    options = [tmp_path / "c.json" if isinstance(o, dict) else o for o in options]
    result = run("demo", *sparse, "--prompt", "Who?", *options)
    assert result.exit_code == 0, result.output
    titles = ("sparse, all kept", "sparse, budget", "sparse, rest cold")
    assert [t for t in titles if t in " ".join(result.output.split())] == names


def test_demo_says_what_is_sampled(sparse, monkeypatch):
    demo = sys.modules["mlx_dsa.cli.demo"]
    prompts = [demo.Prompt("Drawn", "x", "x", True, 2, 0.7), demo.Prompt("Sure", "x", "x", True, 2)]
    monkeypatch.setattr(demo, "_bundled", lambda: iter(prompts))
    result = run("demo", *sparse)
    assert result.exit_code == 0, result.output
    drawn, sure = result.output.split("Sure")
    assert "Sampled at temperature 0.7" in drawn and "Sampled" not in sure


def test_demo_refuses_a_file_without_a_question(sparse):
    refused(run("demo", *sparse, "--file", "x"), 2, "--file needs a question")


def test_the_demo_has_three_prompts():
    prompts = json.loads((resource("prompts") / "demo.json").read_text(encoding="utf-8"))
    assert len(prompts) == 3
    assert any("file" in p and "prompt" in p for p in prompts)
