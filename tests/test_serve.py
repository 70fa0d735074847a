"""mlx-dsa serve: answers as OpenAI's clients take them, over HTTP/1.1."""

import json

import pytest
from mlx_lm.generate import generate
from serving import Client, idle, raw_request, serving, text_of, tiny, user, wait_until

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


@pytest.fixture
def client(server):
    with_client = Client(server)
    yield with_client
    with_client.close()
    wait_until(lambda: idle(server))


def expected(content, n=12, **kwargs):
    preset = tiny()
    prompt = preset.tokenizer.apply_chat_template(user(content), add_generation_prompt=True, **kwargs)
    return generate(preset.model, preset.tokenizer, prompt, max_tokens=n)


def test_an_answer_is_that_of_mlx_lm(client):
    told = client.chat(QUESTION, max_tokens=12)
    assert text_of(told) == expected(QUESTION)
    assert told["object"] == "chat.completion" and told["model"] == "tiny"
    usage, figures = told["usage"], told["mlx_dsa"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] == figures["tokens_seen"]
    assert figures["kv_bytes"] > 0 and figures["dense_kv_bytes"] > 0 and figures["first_token_s"] > 0


def test_a_stream_has_the_same_text_and_one_end(client):
    whole = client.chat(QUESTION, max_tokens=12)
    events = client.stream(QUESTION, max_tokens=12, stream_options={"include_usage": True})
    *pieces, last = events
    choices = [e["choices"][0] for e in pieces]
    assert "".join(c["delta"].get("content", "") for c in choices) == text_of(whole)
    assert [c["finish_reason"] for c in choices if c["finish_reason"]] == [whole["choices"][0]["finish_reason"]]
    assert {e["object"] for e in events} == {"chat.completion.chunk"} and len({e["id"] for e in events}) == 1
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert last["mlx_dsa"]["tokens_seen"] == whole["mlx_dsa"]["tokens_seen"]


def test_a_stream_without_usage_has_none(client):
    assert not [e for e in client.stream(QUESTION, max_tokens=3) if "usage" in e]


def test_one_connection_serves_many_requests(client):
    first = client.get("/health")
    sock = client.connection.sock
    assert first[0] == 200
    for _ in range(3):
        client.chat("Hi", max_tokens=2)
        client.stream("Hi", max_tokens=2)
        assert client.send("POST", "/v1/chat/completions", {"messages": 1})[0] == 400
    assert client.connection.sock is sock


def test_an_old_client_gets_no_chunks(server):
    body = json.dumps({"messages": user("Hi"), "max_tokens": 3, "stream": True}).encode()
    head = b"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body)
    answer = raw_request(server, head + body)
    assert b"chunked" not in answer.lower() and answer.endswith(b"data: [DONE]\n\n")


def test_the_address_may_lack_v1(client):
    assert text_of(client.chat("Hi", path="/chat/completions", max_tokens=3))


@pytest.mark.parametrize("model", ["tiny", "default_model", "", None])
def test_the_model_may_go_by_these_names(client, model):
    assert client.chat("Hi", max_tokens=2, model=model)["model"] == "tiny"


@pytest.mark.parametrize("model", ["gpt-4o", "/etc/passwd", "mlx-community/other"])
def test_another_model_is_not_found(client, model):
    status, _, told = client.send("POST", "/v1/chat/completions", {"messages": user("Hi"), "model": model})
    assert status == 404 and told["error"]["code"] == "model_not_found"
    assert client.get(f"/v1/models/{model}")[0] == 404


def test_the_model_is_listed(client):
    status, _, told = client.get("/v1/models")
    assert status == 200 and [m["id"] for m in told["data"]] == ["tiny"]
    assert client.get("/v1/models/tiny")[2] == told["data"][0]


def test_a_completion_continues_a_text_or_tokens(client):
    prompt = "The capital of France is"
    tokens = tiny().tokenizer.encode(prompt)
    by_text = client.complete(prompt, max_tokens=5)
    assert by_text["object"] == "text_completion" and by_text["usage"]["prompt_tokens"] == len(tokens)
    for other in (tokens, [prompt], [tokens]):
        assert client.complete(other, max_tokens=5)["choices"][0]["text"] == by_text["choices"][0]["text"]
    pieces = [e for e in client.events({"prompt": prompt, "max_tokens": 5}, "/v1/completions") if isinstance(e, dict)]
    assert "".join(e["choices"][0]["text"] for e in pieces) == by_text["choices"][0]["text"]


# Where an answer ends.


def test_a_stop_text_ends_an_answer_wherever_tokens_are_cut(client):
    whole = text_of(client.chat(QUESTION, max_tokens=12))
    assert len(whole) > 8
    for begin in range(1, len(whole) - 4):
        stop = whole[begin : begin + 3]
        told = client.chat(QUESTION, max_tokens=12, stop=["never said", stop])
        assert text_of(told) == (whole[: whole.index(stop)] or None)
        assert told["choices"][0]["finish_reason"] == "stop"
        assert told["usage"]["completion_tokens"] <= 12


def test_a_stop_text_ends_a_stream(client):
    whole = text_of(client.chat(QUESTION, max_tokens=12))
    events = client.stream(QUESTION, max_tokens=12, stop=whole[4:7])
    text = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
    assert text == whole[: whole.index(whole[4:7])]
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


def test_max_tokens_cuts_and_both_names_of_it(client):
    for name in ("max_tokens", "max_completion_tokens"):
        told = client.chat(QUESTION, **{name: 2})
        assert told["usage"]["completion_tokens"] == 2 and told["choices"][0]["finish_reason"] == "length"


# Sampling.


def test_a_seed_gives_the_same_answer_and_another_another(client):
    ask = dict(temperature=1.5, max_tokens=16)
    same = [text_of(client.chat(QUESTION, seed=7, **ask)) for _ in range(2)]
    others = {text_of(client.chat(QUESTION, seed=seed, **ask)) for seed in range(4)}
    assert same[0] == same[1] and len(others) > 1


def test_a_seed_at_temperature_0_changes_nothing(client):
    assert text_of(client.chat(QUESTION, seed=3, max_tokens=8)) == text_of(client.chat(QUESTION, max_tokens=8))


def test_every_way_to_sample_runs(client):
    ways = dict(top_p=0.9, top_k=5000, min_p=0.1, repetition_penalty=1.1, presence_penalty=0.5)
    ways |= dict(frequency_penalty=0.5, logit_bias={"5": -100, "7": 2}, xtc_probability=0.5, xtc_threshold=0.2)
    for key, value in ways.items():
        assert client.chat("Hi", temperature=0.8, max_tokens=3, **{key: value})
    assert client.chat("Hi", temperature=1e-5, max_tokens=3)  # as 0


def test_a_bias_forces_a_token(client):
    token = tiny().tokenizer.encode("Paris")[0]
    told = client.chat(QUESTION, max_tokens=3, logit_bias={str(token): 100})
    assert text_of(told) == tiny().tokenizer.decode([token] * 3)


# Log-probabilities.


def test_log_probabilities_are_in_openais_shape(client):
    told = client.chat(QUESTION, max_tokens=6, logprobs=True, top_logprobs=3)
    content = told["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(c["bytes"]) for c in content).decode() == text_of(told)
    for one in content:
        assert one["logprob"] <= 0 and len(one["top_logprobs"]) == 3
        assert one["top_logprobs"][0]["logprob"] == one["logprob"]  # greedy: the best
        assert [t["logprob"] for t in one["top_logprobs"]] == sorted(t["logprob"] for t in one["top_logprobs"])[::-1]
    events = client.stream(QUESTION, max_tokens=6, logprobs=True, top_logprobs=3)
    streamed = [c for e in events for c in (e["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [c["token"] for c in streamed] == [c["token"] for c in content]
    assert client.chat(QUESTION, max_tokens=2)["choices"][0]["logprobs"] is None


def test_log_probabilities_of_completions(client):
    told = client.complete("The capital of France is", max_tokens=4, logprobs=2)["choices"][0]
    made = told["logprobs"]
    assert "".join(made["tokens"]) == told["text"] and len(made["token_logprobs"]) == len(made["top_logprobs"]) == 4
    assert made["text_offset"] == [sum(map(len, made["tokens"][:i])) for i in range(4)]


# What was read is not read again.


def test_a_second_question_reads_only_what_is_new(client):
    text = "The ferry leaves at nine. " * 40
    first = client.chat(f"{text}\n\nWhen does it leave?", max_tokens=4)["usage"]
    other = client.chat(f"{text}\n\nWho leaves?", max_tokens=4)["usage"]
    again = client.chat(f"{text}\n\nWhen does it leave?", max_tokens=4)["usage"]
    cached = [u["prompt_tokens_details"]["cached_tokens"] for u in (first, other, again)]
    n = first["prompt_tokens"]
    assert cached[0] < 20 and n - 20 < cached[1] < n and cached[2] == n - 1


def test_progress_is_told_as_events_or_comments(client):
    ask = {"max_tokens": 2}
    text = "The lighthouse is on the hill. " * 60
    events = list(client.events({"messages": user(text), **ask}))
    assert any(isinstance(e, str) and e.startswith(": read") for e in events)
    assert not [e for e in events if isinstance(e, dict) and "prompt_progress" in e]
    events = client.stream(text + "!", return_progress=True, **ask)
    told = [e["prompt_progress"] for e in events if "prompt_progress" in e]
    assert told and told[-1]["processed"] == told[-1]["total"] > told[-1]["cache"] > 0
    assert all(e["choices"] == [] for e in events if "prompt_progress" in e)


# What is counted.


def metric(text, name):
    return next(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


def test_metrics_are_prometheus_text(client):
    before = client.get("/metrics")[2].decode()
    client.chat("Count these tokens", max_tokens=3)
    status, headers, text = client.get("/metrics")
    text = text.decode()
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    for name, more in (("tokens_generated", 3), ("requests", 0), ("first_token_seconds_count", 1)):
        name = f"mlx_dsa_{name}" + ("" if name.endswith("count") else "_total")
        key = f'{name}{{endpoint="/v1/chat/completions",status="200"}}' if "requests" in name else name
        assert metric(text, key) - metric(before, key) == (more or 1)
    kinds = {}
    for line in text.splitlines():
        if line.startswith("# TYPE"):
            _, _, name, kind = line.split(" ")
            kinds[name] = kind
        elif not line.startswith("#"):
            name = line.split("{")[0].split(" ")[0]
            base = name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count")
            assert name in kinds or kinds[base] == "histogram"
            float(line.rsplit(" ", 1)[1])
    for name in ("queue_length", "rows_decoding", "kv_bytes", "snapshot_bytes", "entries_kept"):
        assert kinds[f"mlx_dsa_{name}"] == "gauge"


def test_what_a_server_had_is_let_go_as_mlx_lm_lets_it_go():
    with serving() as running:
        provider = running.provider
        assert provider.is_batchable
    assert provider.model is None and provider.tokenizer is None and not provider.is_batchable
