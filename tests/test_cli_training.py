"""mlx-dsa train --both, and what every run shows: scores, speed, and how it stops."""

import os
import signal
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from local_models import write_model

from mlx_dsa.cli import main
from mlx_dsa.cli.training import Display, describe, worst_layer
from mlx_dsa.train import (
    BothScore,
    LayerScore,
    RetentionConfig,
    RetentionScore,
    TrainConfig,
    TrainProgress,
    TrainResult,
)

train_module = sys.modules["mlx_dsa.cli.train"]  # cli.train is the command
SCORES = {
    0: BothScore(1.0, 0.5, 0.75, 0.9, 0.2, 0.4, 0.6),
    1: BothScore(1.0, 0.5, 0.6, 1.0, 0.2, 0.4, 0.6),
}


def progress(step, tokens=0, seconds=0.0, held_out=None):
    loss = 1.5 if step else None
    return TrainProgress(step, 10, loss, 1e-3, tokens, seconds, held_out)


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Stand in for the trainer and note how it was called."""
    calls = []

    def train_together(model, tokenizer, data, out, config, retention, *, resume, progress):
        calls.append((data, out, config, retention, resume))
        file = tmp_path / "indexers.safetensors"
        return TrainResult(file, {0: [7, 9], 1: [8, 9]}, SCORES)

    monkeypatch.setattr(train_module, "train_together", train_together)
    return calls


def run(tmp_path, *more):
    model = tmp_path / "model"
    if not model.exists():
        write_model(model)
    words = ["train", "--model", model, "--data", "x", "--out", tmp_path / "out", *more]
    return CliRunner().invoke(main, [str(word) for word in words])


def test_both_passes_its_options_to_either_config(trained, tmp_path):
    file = tmp_path / "train.json"
    file.write_text('{"steps": 9, "repeat_share": 0.25}')
    more = ["--both", "--config", file, "--steps", 2, "--top-k", 99, "--retention-dim", 8]
    result = run(tmp_path, *more)
    assert result.exit_code == 0, result.output
    ((data, out, config, retention, resume),) = trained
    assert (data, out, resume) == ("x", str(tmp_path / "out"), False)
    assert config == TrainConfig(steps=2, top_k=99)
    assert retention == RetentionConfig(steps=2, repeat_share=0.25, retention_dim=8)
    assert "Best step of each layer: 0: 7/9, 1: 8/9" in result.output
    assert "Worst layer: 1, mass@K 0.600 of the teacher's own top-k" in result.output
    last = result.output.splitlines()[-1]
    assert last.startswith("Try: mlx-dsa chat") and last.endswith("--top-k 99")


@pytest.mark.parametrize(
    "more, code, words",
    [
        (("--both", "--retention"), 2, "leave --retention out"),
        (("--both", "--indexer", "x"), 2, "--indexer goes with --retention"),
        (("--retention-dim", 8), 2, "with --retention or --both"),
        (("--both", "--retention-dim", 0), 1, "--retention-dim must be"),
        (("--both", "--config", "BAD"), 1, "'topk'"),
    ],
)
def test_bad_options_are_one_line(trained, tmp_path, more, code, words):
    bad = tmp_path / "bad.json"
    bad.write_text('{"topk": 9}')
    result = run(tmp_path, *(bad if word == "BAD" else word for word in more))
    errors = [line for line in result.output.splitlines() if line.startswith("Error")]
    assert result.exit_code == code and len(errors) == 1 and words in errors[0], result.output
    assert not trained


def test_an_unfinished_run_says_how_to_go_on(trained, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "checkpoint.safetensors").write_text("")
    result = run(tmp_path, "--both")
    assert result.exit_code == 1 and "Go on with --resume" in result.output
    assert run(tmp_path, "--both", "--resume").exit_code == 0 and len(trained) == 1


def test_scores_are_told_as_shares_of_the_teachers_own():
    told = describe(SCORES)
    share = (0.75 / 0.9 + 0.6) / 2
    assert f"mass@K 0.675, {share:.3f} of the teacher's own top-k" in told
    assert told.endswith("heads: loss 0.2000, rank agreement at 1/16 0.400, at 1/8 0.600")
    heads = {0: RetentionScore(0.2, 0.4, 0.6)}
    assert "heads" not in describe(heads) and worst_layer(heads) is None
    assert worst_layer({3: LayerScore(1.0, 0.5, 0.5, 0.5)}).startswith("Worst layer: 3, mass@K 1.000")


def test_the_speed_is_that_of_this_process(capsys):
    """A run that goes on has tokens from before, which took other time."""
    with Display() as display:
        display(progress(4, tokens=4000, seconds=5.0))
        display(progress(5, tokens=5000, seconds=7.0, held_out=SCORES))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("step 5: held out loss") and line.endswith(", 500 tokens/s")


def press():
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_ends_a_run_after_its_step(capsys):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Display() as display:
        display(progress(0))
        press()  # within a step: nothing happens yet
        display.still_there = True
        display(progress(1))
    assert display.still_there
    assert "Stopping after this step" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) == before


def test_a_second_ctrl_c_ends_it_at_once():
    with pytest.raises(KeyboardInterrupt), Display() as display:
        display(progress(0))
        press()
        press()
        pytest.fail("still running")


def test_a_run_that_is_done_is_not_stopped():
    with Display() as display:
        display(progress(9))
        press()
        display(progress(10))


def test_ctrl_c_before_the_first_step_ends_it_at_once():
    with pytest.raises(KeyboardInterrupt), Display():
        press()
        pytest.fail("still running")


def test_the_command_goes_on_after_ctrl_c_to_the_same_file(tmp_path, monkeypatch):
    from test_train import write_text

    data = write_text(tmp_path)
    options = "--both --steps 6 --sequence-length 300 --top-k 64 --held-out 1 --query-rows 8"
    more = [*options.split(), "--data", data]
    model = write_model(tmp_path / "model")

    def train(out, *words):
        given = ["train", "--model", model, *more, "--out", tmp_path / out, *words]
        return CliRunner().invoke(main, [str(word) for word in given])

    def pressed(display, now, original=Display.__call__):
        if now.step == 2:
            press()
        original(display, now)

    assert train("whole").exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(Display, "__call__", pressed)
        stopped = train("cut")
    assert stopped.exit_code == 130 and "--resume goes on" in stopped.output
    assert train("cut", "--resume").exit_code == 0
    name = "indexers.safetensors"
    whole, cut = (Path(tmp_path / folder / name).read_bytes() for folder in ("whole", "cut"))
    assert whole == cut
