"""The openai package as a client, where it is installed."""

import asyncio
import json

import pytest
from serving import serving

openai = pytest.importorskip("openai")

USER = [{"role": "user", "content": "What is the capital of France?"}]
HELLO = [{"role": "user", "content": "Hi there"}]  # its answer ends by itself
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def server():
    with serving(api_key="key") as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="key", max_retries=0) as made:
        yield made


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "mlx-dsa"


def test_a_chat(client):
    told = client.chat.completions.create(model="tiny", messages=USER, max_tokens=8)
    assert told.choices[0].message.content and told.usage.prompt_tokens_details.cached_tokens >= 0
    assert told.choices[0].message.role == "assistant"


def test_a_stream(client):
    whole = client.chat.completions.create(model="tiny", messages=USER, max_tokens=8)
    options = {"include_usage": True}
    stream = client.chat.completions.create(
        model="tiny", messages=USER, max_tokens=8, stream=True, stream_options=options
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_the_stream_helper(client):
    with client.chat.completions.stream(model="tiny", messages=HELLO, max_tokens=30) as stream:
        kinds = {event.type for event in stream}
        told = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds and told.choices[0].message.content


def test_log_probabilities(client):
    told = client.chat.completions.create(model="tiny", messages=USER, max_tokens=4, logprobs=True, top_logprobs=2)
    content = told.choices[0].logprobs.content
    assert "".join(c.token for c in content) == told.choices[0].message.content
    assert all(len(c.top_logprobs) == 2 and c.bytes for c in content)
    told = client.completions.create(model="tiny", prompt="The capital of", max_tokens=4, logprobs=2)
    assert len(told.choices[0].logprobs.tokens) == 4


def test_a_stop_text(client):
    whole = client.chat.completions.create(model="tiny", messages=USER, max_tokens=8).choices[0].message.content
    told = client.chat.completions.create(model="tiny", messages=USER, max_tokens=8, stop=[whole[3:6]])
    assert told.choices[0].message.content == whole[: whole.index(whole[3:6])]
    assert told.choices[0].finish_reason == "stop"


def test_what_is_refused(client):
    create = client.chat.completions.create
    with pytest.raises(openai.BadRequestError, match="'n' must be 1"):
        create(model="tiny", messages=USER, n=2)
    with pytest.raises(openai.NotFoundError) as error:
        create(model="gpt-4o", messages=USER)
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as error:
        create(model="tiny", messages=[{"role": "user", "content": "word " * 20_000}])
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="other").chat.completions.create(model="tiny", messages=USER)


def test_tools_are_taken(client, server):
    """The bundled model calls none by itself: the answer that calls one is put in its mouth."""
    told = client.chat.completions.create(model="tiny", messages=USER, max_tokens=4, tools=[TOOL])
    assert told.choices[0].message is not None
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": json.dumps({"sky": "blue"})},
    ]
    assert client.chat.completions.create(model="tiny", messages=messages, max_tokens=4, tools=[TOOL]).choices


def test_sixteen_at_once(server):
    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="key", max_retries=0) as client:
            asked = [
                client.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": f"Say {i}"}], max_tokens=8
                )
                for i in range(16)
            ]
            return [told.choices[0].message.content for told in await asyncio.gather(*asked)]

    assert all(asyncio.run(ask_all()))


def test_a_stream_that_is_closed_early_frees_its_row(client, server):
    import time

    stream = client.chat.completions.create(
        model="tiny", messages=USER, max_tokens=5000, stream=True, logit_bias={"2": -100, "0": -100}
    )
    next(iter(stream))
    stream.close()
    end = time.monotonic() + 5
    while len(server.generation._rows):
        assert time.monotonic() < end
        time.sleep(0.02)
