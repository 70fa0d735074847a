"""prefill="stream" on the command line, in files of settings, and in what evaluates."""

import json
import re

import pytest
from test_compress import TOLD, answer_of, ask, compress, options, refused, run
from test_compress import folder as folder

from mlx_dsa import SparseConfig
from mlx_dsa.evals import make_policies

STREAM = ["--prefill", "stream", "--stream-chunk", 64]


def test_a_document_is_streamed_and_asked(folder, tmp_path):
    result = compress(folder, tmp_path / "book.kv", *STREAM)
    assert result.exit_code == 0, result.output
    assert TOLD.search(result.output)[2] == "100"
    # What the file says is taken, and need not be said again.
    first = answer_of(ask(folder, tmp_path / "book.kv"))
    assert first == answer_of(ask(folder, tmp_path / "book.kv", *STREAM)) != ""
    question = ["--prompt", "How many sheep?", "--max-tokens", 12]
    for command in ("chat", "generate"):
        document = ["--file", folder / "book.txt"]
        said = document + (question if command == "chat" else question[2:])
        read = run(command, *said, *options(folder), *STREAM)
        assert answer_of(read) and "100 entries kept" in read.output


def test_saved_documents_name_how_they_were_read(folder, tmp_path):
    file = tmp_path / "book.kv"
    assert compress(folder, file, *STREAM).exit_code == 0
    refused(ask(folder, file, "--stream-chunk", 32), 1, "--stream-chunk 32", "made with 64")
    refused(ask(folder, file, "--prefill", "exact"), 1, "--prefill exact", "made with stream")
    assert compress(folder, file, "--force", "--prefill", "exact").exit_code == 0
    refused(ask(folder, file, *STREAM), 1, "--prefill stream", "made with exact")
    assert answer_of(ask(folder, file, "--prefill", "dense"))


def test_info_tells_the_cuts(folder, tmp_path):
    told = run("info", *options(folder), *STREAM).output
    assert "prefill stream (a cut every 64)" in told
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"prefill": "stream", "stream_chunk": 256}))
    assert "a cut every 256" in run("info", "--config", file).output
    assert "a cut" not in run("info", *options(folder)).output


@pytest.mark.parametrize(
    "given, code, says",
    [
        (["--stream-chunk", 64], 2, "--stream-chunk has no effect without --prefill stream"),
        (["--dense", *STREAM], 2, "no effect with --dense"),
        (["--prefill", "stream", "--stream-chunk", 0], 1, "--stream-chunk must be a whole number"),
        (["--prefill", "stream", "--cache", "full"], 1, "not for 'full'. Use --cache tiered"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(given, code, says):
    refused(run("chat", "--prompt", "x", *given), code, says)


def test_evaluations_take_it_as_a_policy():
    base = SparseConfig(top_k=40, n_recent=8, prefill="dense", stream_chunk=16)
    dense, once, stream = make_policies(["dense", "retention", "stream"], base)
    assert [p.streams for p in (dense, once, stream)] == [False, False, True]
    assert stream.config.stream_chunk == 16 and stream.label == "stream@40"
    named = {"policy": "keydiff", "prefill": "stream", "stream_chunk": 32, "label": "x"}
    assert make_policies([named], base)[0].config.stream_chunk == 32
    with pytest.raises(ValueError, match="prefill 'stream' by itself but got 'dense'"):
        make_policies([{"policy": "stream", "prefill": "dense"}], base)
    few = ["--lengths", 200, "--depths", 1, "--limit", 1, "--top-k", 100, "--stream-chunk", 64]
    told = run("eval", "needle", *few, "--policies", "stream")
    assert told.exit_code == 0 and re.search(r"stream@100", told.output), told.output
    refused(run("eval", "needle", *few, "--policies", "dense,sparse"), 2, "no effect on dense, sparse")


def test_bench_says_how_it_read(folder, tmp_path):
    out = tmp_path / "bench.json"
    result = run(
        "bench", *options(folder), *STREAM,
        "--contexts", 300, "--steps", 1, "--repeats", 1, "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    said = json.loads(out.read_text())
    assert said["rows"][0]["prefill"]["mode"] == "stream"
    assert said["config"]["stream_chunk"] == 64
