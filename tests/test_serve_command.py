"""The command mlx-dsa serve: its line, its signals, its exit codes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from serving import Client, user

from mlx_dsa.cli import main
from mlx_dsa.serve.store import claim_folder

LONG = {"messages": user("Hi"), "max_tokens": 4000, "logit_bias": {"2": -100, "0": -100}}


@contextmanager
def command(*options, environment=None):
    """Run the command; yield the process and where it listens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_dsa", "serve", "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    try:
        line = process.stdout.readline()
        found = re.fullmatch(r"Listening at http://(127\.0\.0\.1):(\d+)\n", line)
        assert found, (line, process.poll() is not None and process.stderr.read())
        yield process, SimpleNamespace(address=(found[1], int(found[2])))
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def end_of(process, seconds=30):
    """Return the exit code and what was said on standard error."""
    _, told = process.communicate(timeout=seconds)
    return process.returncode, told


def test_it_serves_and_a_signal_lets_answers_end():
    with command("--max-tokens", "3", environment={"MLX_DSA_API_KEY": "k"}) as (process, server):
        client = Client(server, key="k")
        assert client.chat("Hi")["usage"]["completion_tokens"] <= 3  # and the default of the command
        assert Client(server).send("GET", "/v1/models")[0] == 401
        running = client.events({**LONG, "max_tokens": 150})
        next(running)
        process.send_signal(signal.SIGTERM)
        events = [event for event in running if isinstance(event, dict)]
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        code, told = end_of(process)
    assert code == 0 and "Traceback" not in told
    assert "Stopping" in told and "POST /v1/chat/completions 200" in told and "Hi" not in told


def test_a_second_signal_ends_at_once():
    number = signal.SIGINT
    with command("--dense") as (process, server):
        running = Client(server).events({**LONG, "max_tokens": 10_000})
        next(running)
        process.send_signal(number)
        time.sleep(1)
        assert process.poll() is None  # the control: the answer goes on
        process.send_signal(number)
        code, told = end_of(process, 5)
    assert code == 128 + number and "Traceback" not in told


def test_a_port_that_is_taken_is_told_in_a_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(main, ["serve", "--dense", "--port", str(port)])
    assert result.exit_code == 1 and result.output.count("\n") == 1
    assert f"port {port}" in result.output and "in use" in result.output
    result = CliRunner().invoke(main, ["serve", "--host", "no.such.host.invalid"])
    assert result.exit_code == 1 and "no.such.host.invalid" in result.output


@pytest.mark.parametrize(
    "options, said",
    [(["--max-body", "much"], "no number of bytes"), (["--port", "70000"], "range"),
     (["--dense", "--top-k", "5"], "no effect"), (["--dense", "--store", "kept"], "no effect"),
     (["--max-queue", "0"], "range"), (["--preset", "nothing"], "nothing"), (["--api-key", ""], "is empty"),
     (["--max-body", "0"], "at least 1024"), (["--allowed-origins", "http://a:1,nonsense"], "'nonsense'"),
     (["--store", __file__], "is a file")],
)  # fmt: skip
def test_options_that_are_not_valid(options, said):
    result = CliRunner().invoke(main, ["serve", *options])
    assert result.exit_code == 2 and said in result.output


def test_a_folder_is_of_one_server_and_a_killed_one_leaves_it(tmp_path):
    (tmp_path / "kept").mkdir()
    first = claim_folder(tmp_path / "kept")
    with pytest.raises(ValueError, match="another server keeps its states in .*kept. Name another folder"):
        claim_folder(tmp_path / "kept")
    os.close(first._file)  # as the system does for a process that is killed
    claim_folder(tmp_path / "kept").release()
    assert not list((tmp_path / "kept").iterdir())


def test_a_key_that_is_an_empty_variable_is_no_key(monkeypatch):
    monkeypatch.setenv("MLX_DSA_API_KEY", "")
    result = CliRunner().invoke(main, ["serve", "--port", "0"])
    assert result.exit_code == 2 and "is empty" in result.output


def test_a_model_that_is_not_there_is_told_as_such():
    result = CliRunner().invoke(main, ["serve", "--model", "/no/such/folder"])
    assert result.exit_code == 1 and "there is no file or folder /no/such/folder" in result.output


def test_without_a_key_beyond_this_machine_is_warned_of():
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_dsa", "serve", "--dense", "--port", "0", "--host", "0.0.0.0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        port = int(re.search(r":(\d+)$", process.stdout.readline().strip())[1])
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
            assert json.load(answer) == {"status": "ok"}
        process.send_signal(signal.SIGINT)
        code, told = end_of(process)
    finally:
        process.kill()
        process.wait()
    assert code == 0 and len([line for line in told.splitlines() if "--api-key" in line]) == 1
