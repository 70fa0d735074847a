"""What all commands share: options that count once, errors in their words, exit codes."""

import json
import sys
import warnings

import click
import pytest
from click.testing import CliRunner
from local_models import write_indexers, write_model

from mlx_dsa import SparseConfig
from mlx_dsa.cli import main
from mlx_dsa.cli.command import Command, in_options, takes_one_value
from mlx_dsa.evals.policies import make_policies
from mlx_dsa.rules import rule_names
from mlx_dsa.train import TrainConfig


def run(*arguments, given=""):
    return CliRunner().invoke(main, [str(a) for a in arguments], input=given)


def error_of(result, code):
    """Return the one line of error of a run that ended with a code."""
    errors = [line for line in result.output.splitlines() if line.startswith("Error")]
    assert result.exit_code == code, (result.output, result.exception)
    assert len(errors) == 1 and "Traceback" not in result.output
    return errors[0]


def all_commands(group=main, path=()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from all_commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(all_commands())


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    root = tmp_path_factory.mktemp("local")
    return ["--model", write_model(root / "model"), "--indexer", write_indexers(root / "i")]


# No option counts twice


@pytest.mark.parametrize(
    "path, option",
    [
        (path, max(param.opts, key=len))
        for path, command in COMMANDS.items()
        for param in command.params
        if takes_one_value(param)
    ],
    ids=str,
)
def test_a_repeated_option_is_refused(path, option):
    error = error_of(run(*path, option, "1", option, "1"), 2)
    assert "is there twice" in error


def test_what_may_be_repeated():
    assert all(isinstance(command, Command) for command in COMMANDS.values())

    @click.command(cls=Command)
    @click.option("--name", "-n")
    @click.option("--many", multiple=True)
    @click.option("--flag", is_flag=True)
    @click.option("-v", count=True)
    @click.argument("files", nargs=-1)
    def command(**given):
        click.echo(json.dumps(given))

    words = "a --many 1 --flag -v b --many 2 --flag -v -n x"
    result = CliRunner().invoke(command, words.split())
    assert json.loads(result.output) == {
        "name": "x", "many": ["1", "2"], "flag": True, "v": 2, "files": ["a", "b"]
    }  # fmt: skip
    assert CliRunner().invoke(command, ["-n", "x", "--name=y"]).exit_code == 2
    # After -- there are no options.
    assert CliRunner().invoke(command, ["-n", "x", "--", "-n", "y"]).exit_code == 0


# Errors in the words of the command line


def message(made, **fields):
    with pytest.raises(ValueError) as caught:
        made(**fields)
    return str(caught.value)


@pytest.mark.parametrize(
    "text, words",
    [
        (
            message(SparseConfig, top_k=10, n_recent=9),
            "--top-k must be at least n_sink + --n-recent = 13 but got 10. Raise --top-k, or "
            "lower --n-recent. Set n_sink in a --config file.",
        ),
        (
            message(SparseConfig, cold_file="a.cold"),
            "--cold is for cache 'tiered' only, not for 'budget'. Leave it out, or use --cache tiered.",
        ),
        (
            message(SparseConfig, backend="no", n_recent=9),
            "'backend' must be one of auto, reference, metal, cuda but got 'no'. Set backend in a --config file.",
        ),
        (
            message(SparseConfig, evict="no"),
            f"--evict must be one of {', '.join(rule_names('evict'))} but got 'no'.",
        ),
        ("[save] 'prefill' of my_top_k/top_k.txt", "--prefill of my_top_k/top_k.txt"),
        ("the cache and the prefill stay words", "the cache and the prefill stay words"),
        (message(SparseConfig.from_dict, values={"topk": 1}), "unknown key 'topk'"),
        (message(SparseConfig.from_dict, values={"topk": 1}), "are top_k, cache, n_sink"),
    ],
)
def test_fields_are_named_as_options(text, words):
    found = in_options(text, main.commands["chat"])
    assert found == words or (words in found and "unknown key" in found)


def test_a_field_is_the_option_of_its_command():
    text = "[x] 'batch_size' and 'evict' and 'haystack'"
    assert in_options(text, COMMANDS["eval", "needle"]).startswith("--batch and 'evict' and --haystack")
    assert in_options(text, COMMANDS["bench",]).startswith("'batch_size' and --evict")
    text = message(TrainConfig, n_recent=3000)
    assert in_options(text, COMMANDS["train",]).startswith("--top-k must exceed --n-sink")


def test_a_warning_names_options_too(sparse):
    output = run("generate", *sparse, "--prompt", "x", "--max-tokens", 1, "--top-k", 40).output
    (note,) = [line for line in output.splitlines() if "lowered" in line]
    assert note == ("Note: --n-recent is lowered from 64 to 20, half of --top-k. Give --n-recent to choose it.")


# One rule for n_recent, whichever command


ONE_BUDGET = {
    "generate": ["generate", "--prompt", "x", "--max-tokens", 1],
    "compress": ["compress", "TEXT", "--out", "OUT", "--force"],
    "memory": ["eval", "memory", "--lengths", 64],
    "needle": ["eval", "needle", "--quick", "--lengths", 200, "--max-tokens", 1],
    "bench": ["bench", "--contexts", 64, "--steps", 1, "--repeats", 1],
}


@pytest.mark.parametrize("name", ONE_BUDGET)
def test_every_command_lowers_n_recent_alike_and_says_so(name, sparse, tmp_path):
    (tmp_path / "text.txt").write_text("A line of plain text. " * 9)
    places = {"TEXT": tmp_path / "text.txt", "OUT": tmp_path / "out.kv"}
    words = [places.get(word, word) for word in ONE_BUDGET[name]]
    result = run(*words, *sparse, "--top-k", 24)
    assert result.exit_code == 0, result.output
    assert "Note: --n-recent is lowered from 64 to 12, half of --top-k." in result.output
    result = run(*words, *sparse, "--top-k", 24, "--n-recent", 21)
    assert "at least n_sink + --n-recent = 25 but got 24" in error_of(result, 1)
    assert "lowered" not in result.output


def test_policies_follow_the_same_rule():
    base = SparseConfig(top_k=256, n_recent=128)
    with pytest.warns(UserWarning, match="lowered from 128 to 50"):
        _, by_number, by_policy = make_policies(["dense", "sparse", {"policy": "exact", "top_k": 100}], base, [100])
    assert by_number.config.n_recent == by_policy.config.n_recent == 50
    (own,) = make_policies(["sparse"], base, [{"top_k": 100, "n_recent": 90}])
    assert own.config.n_recent == 90


def test_a_command_line_goes_over_a_file_here_too(sparse, tmp_path):
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"top_k": 300, "n_recent": 200}))
    assert "200 recent" in run("info", *sparse, "--config", file).output
    lowered = run("info", *sparse, "--config", file, "--top-k", 100).output
    assert "50 recent" in lowered and "lowered from 200 to 50" in lowered


# Numbers that are none


@pytest.mark.parametrize("seed", ["-1", str(2**32), "9" * 30, "1.5", "nan"])
@pytest.mark.parametrize("path", [p for p, c in COMMANDS.items() if any(o.name == "seed" for o in c.params)], ids=str)
def test_a_seed_out_of_range_is_refused(path, seed):
    temp = ["--temp", "1"] if path[0] in ("chat", "generate") else []
    assert "--seed" in error_of(run(*path, "--seed", seed, *temp), 2)


def test_the_largest_seed_works(sparse):
    options = ["--prompt", "x", "--max-tokens", 1, "--temp", 1, "--seed", 2**32 - 1]
    assert run("generate", *sparse, *options).exit_code == 0


def test_a_seed_in_a_file_is_checked_too():
    with pytest.raises(ValueError, match="'seed' must be below"):
        TrainConfig(seed=2**32)
    assert TrainConfig(seed=2**32 - 1).seed == 2**32 - 1


@pytest.mark.parametrize("command", ["chat", "generate"])
@pytest.mark.parametrize("temp", ["nan", "inf", "-inf", "1e999", "1e-40", "-0.5"])
def test_a_temperature_that_gives_noise_is_refused(command, temp):
    assert "--temp" in error_of(run(command, "--prompt", "x", "--temp", temp), 2)


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1"])
def test_seconds_that_never_end_are_refused(seconds):
    assert "--seconds" in error_of(run("tune", "--seconds", seconds), 2)


# Exit codes


@pytest.mark.parametrize(
    "module, words",
    [
        ("session", ["generate", "--prompt", "x"]),
        ("session", ["chat", "--prompt", "x"]),
        ("session", ["compress", "FILE", "--out", "OUT"]),
        ("demo", ["demo"]),
        ("subject", ["bench"]),
        ("subject", ["tune"]),
        ("eval.options", ["eval", "needle"]),
        ("eval.options", ["eval", "retrieval"]),
        ("train", ["train", "--data", "FILE", "--out", "OUT"]),
    ],
)
def test_a_stop_is_exit_130_everywhere(module, words, monkeypatch, tmp_path):
    def stops(*arguments, **options):
        raise KeyboardInterrupt

    (tmp_path / "text.txt").write_text("text")
    monkeypatch.setenv("MLX_DSA_CACHE", str(tmp_path))
    loads = "load_model" if module == "train" else "load_settings"
    monkeypatch.setattr(sys.modules[f"mlx_dsa.cli.{module}"], loads, stops)
    places = {"FILE": tmp_path / "text.txt", "OUT": tmp_path / "out"}
    result = run(*(places.get(word, word) for word in words))
    assert result.exit_code == 130 and "Stopped." in result.output


@pytest.fixture(autouse=True)
def own_warnings():
    """The command says warnings in its own way, for good."""
    with warnings.catch_warnings():
        yield
