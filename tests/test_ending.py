"""A signal ends a command in order: nothing is left, and the same command runs again."""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
from pathlib import Path

import mlx.core as mx
import pytest
from local_models import write_indexers, write_model

from mlx_dsa.cli import ending
from mlx_dsa.cli.ending import orderly_end

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A chat that has answered, with a cold file, and waits for the next question."""
    root = tmp_path_factory.mktemp("local")
    mx.random.seed(0)
    write_model(root / "model")
    write_indexers(root / "indexer", retention_dim=4)
    (root / "book.txt").write_text(" ".join(f"{i} sheep and a goat." for i in range(60)))
    options = ["--model", "model", "--indexer", "indexer", "--file", "book.txt"]
    options += ["--top-k", "100", "--cache", "tiered", "--prompt", "How many?"]

    def start(cold, *more, ignored=None, terminal=None):
        command = [sys.executable, "-m", "mlx_dsa", "chat", *options, "--cold", str(cold), *more]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}

        def prepare():
            if ignored is not None:
                signal.signal(ignored, signal.SIG_IGN)
            if terminal is not None:
                os.setsid()
                fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

        ends = dict.fromkeys(("stdin", "stdout", "stderr"), terminal or subprocess.PIPE)
        return subprocess.Popen(command, cwd=root, env=environment, text=True, preexec_fn=prepare, **ends)

    return start


WAITING = "--interactive", "--max-tokens", "4"
ANSWERING = "--max-tokens", "1000000"


def wait_for(process, cold, more):
    if more is WAITING:
        while "tokens seen" not in (line := process.stderr.readline()):
            assert line
    else:
        assert process.stdout.read(1)
    assert cold.exists()


@pytest.mark.parametrize("number, more", [(signal.SIGTERM, ANSWERING), (signal.SIGHUP, WAITING)])
def test_a_signal_leaves_no_cold_file(chat, tmp_path, number, more):
    cold = tmp_path / "cold"
    with chat(cold, *more) as process:
        wait_for(process, cold, more)
        process.send_signal(number)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_what_a_kill_left_does_not_stop_the_next_run_and_a_live_one_does(chat, tmp_path):
    cold = tmp_path / "cold"
    with chat(cold, *WAITING) as process:
        wait_for(process, cold, WAITING)
        with chat(cold, "--max-tokens", "4") as other:
            _, errors = other.communicate(timeout=60)
        assert other.returncode == 1 and cold.exists()
        assert "in use by another run" in errors and "Traceback" not in errors
        process.kill()
    assert cold.exists()
    with chat(cold, "--max-tokens", "4") as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert not cold.exists()


def test_a_hangup_that_is_ignored_ends_nothing(chat, tmp_path):
    cold = tmp_path / "cold"
    with chat(cold, *WAITING, ignored=signal.SIGHUP) as process:
        wait_for(process, cold, WAITING)
        process.send_signal(signal.SIGHUP)
        _, errors = process.communicate("And goats?\n", timeout=60)
    assert process.returncode == 0 and "tokens seen" in errors


def test_the_code_is_of_the_signal_even_where_cleaning_up_fails():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        with orderly_end():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os.kill(os.getpid(), signal.SIGHUP)  # must not stop this
                raise OSError("the terminal has gone")
    assert end.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_was_lost_can_be_sent_again(monkeypatch):
    monkeypatch.setattr(ending, "_GRACE", 0.0)
    with pytest.raises(SystemExit):
        with orderly_end():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except SystemExit:
                pass
            os.kill(os.getpid(), signal.SIGTERM)


def test_other_errors_and_other_threads_are_left_alone():
    with pytest.raises(OSError, match="mine"):
        with orderly_end():
            raise OSError("mine")

    def in_a_thread():
        with orderly_end():
            done.append(signal.getsignal(signal.SIGTERM))

    done = []
    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert done == [signal.SIG_DFL]


def test_a_terminal_that_is_closed_leaves_no_cold_file(chat, tmp_path):
    cold = tmp_path / "cold"
    ours, theirs = pty.openpty()
    with chat(cold, *WAITING, terminal=theirs) as process:
        os.close(theirs)
        seen = b""
        while b"tokens seen" not in seen:
            seen += os.read(ours, 1000)
        assert cold.exists()
        os.close(ours)
        assert process.wait(timeout=60) in (0, 128 + signal.SIGHUP)
    assert not list(tmp_path.iterdir())
