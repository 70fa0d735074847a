"""What an answer has beside its text: tool calls, thoughts; and sparse answers as mlx-lm gives them."""

import json

import pytest
from mlx_lm.generate import generate
from serving import Client, long_text, serving, text_of, tiny, user

import mlx_dsa.serve.rows as rows_module
from mlx_dsa.serve.provider import Provider

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


class WithTools:
    """The bundled tokenizer, and marks of tool calls such as a model of tools has."""

    tool_call_start, tool_call_end = "<tool_call>", "</tool_call>"
    has_tool_calling = True

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def tool_parser(self, text, tools):
        if "oops" in text:
            raise KeyError("a parser that fails in its own way")
        return json.loads(text)

    def __getattr__(self, name):
        return getattr(self.__dict__["_tokenizer"], name)


@pytest.fixture(scope="module")
def server():
    import mlx_dsa.serve as serve

    preset = tiny()
    provider = Provider(preset.model, WithTools(preset.tokenizer), "tiny", serve.ServeOptions())
    with serving(provider=provider) as running:
        yield running


@pytest.fixture
def say(monkeypatch):
    """Put words in the model's mouth."""
    tokenizer = tiny().tokenizer

    def put(text):
        script = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]

        def processors(args):
            left = list(script)

            def force(tokens, logits):
                import mlx.core as mx

                token = left.pop(0) if left else script[-1]
                return mx.where(mx.arange(logits.shape[-1]) == token, 100.0, -100.0)[None]

            return [force]

        monkeypatch.setattr(rows_module, "processors_of", processors)
        monkeypatch.setattr(rows_module, "try_out", lambda *arguments: None)

    return put


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def test_a_tool_call(server, say):
    say("Let me see. " + CALL)
    told = Client(server).chat("How is the weather?", tools=TOOLS, max_tokens=80)["choices"][0]
    (call,) = told["message"]["tool_calls"]
    assert told["finish_reason"] == "tool_calls" and told["message"]["content"].startswith("Let me see.")
    assert call["type"] == "function" and call["id"] and call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}


def test_tool_calls_of_a_stream(server, say):
    say(CALL + CALL)
    events = Client(server).stream("How is the weather?", tools=TOOLS, max_tokens=120)
    deltas = [e["choices"][0]["delta"] for e in events]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call["index"] for call in calls] == [0, 1]
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert "tool_call" not in "".join(delta.get("content", "") for delta in deltas)


def test_a_call_that_can_not_be_parsed_ends_no_server(server, say):
    say('<tool_call>\n{"name": "oops"\n</tool_call>')
    told = Client(server).chat("How is the weather?", tools=TOOLS, max_tokens=80)["choices"][0]
    assert not told["message"].get("tool_calls") and told["finish_reason"] == "stop"


def test_thoughts_stand_beside_the_answer(server, say):
    say("<think>\nIs it Paris?\n</think>\n\nIt is Paris.")
    told = Client(server).chat("Which city?", max_tokens=60)["choices"][0]["message"]
    assert told["reasoning"].strip() == told["reasoning_content"].strip() == "Is it Paris?"
    assert told["content"].strip() == "It is Paris."
    events = Client(server).stream("Which city?", max_tokens=60)
    deltas = [e["choices"][0]["delta"] for e in events]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas).strip() == "Is it Paris?"
    assert "".join(delta.get("content", "") for delta in deltas).strip() == "It is Paris."


def test_parts_of_a_message_are_one_text(server):
    client = Client(server)
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "the capital of France?"}]
    system = {"role": "developer", "content": "Be brief."}
    told = client.chat([system, {"role": "user", "content": parts}], max_tokens=6)
    assert text_of(told) == text_of(
        client.chat([{**system, "role": "system"}, *user("What is the capital of France?")], max_tokens=6)
    )


def test_a_call_and_its_result_are_rendered(server):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    messages = [
        *user("What is 2+3?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "5", "tool_call_id": "1"},
    ]
    assert Client(server).chat(messages, tools=TOOLS, max_tokens=4)["choices"]


# Sparse: in parts or as a whole, alone or in a batch, the answer is mlx-lm's.


@pytest.mark.parametrize(
    "config",
    [dict(), dict(cache="full"), dict(cache="tiered"), dict(prefill="stream", stream_chunk=512)],
    ids=["budget", "full", "tiered", "stream"],
)
def test_a_sparse_answer_is_that_of_mlx_lm(config):
    content = (
        f"{long_text(500)}The password of the mill is marigold. {long_text(500)}\n\nWhat is the password of the mill?"
    )
    with serving(dense=False, config=config, prompt_chunk=256, snapshot_bytes=1 << 30) as server:
        provider = server.provider
        prompt = provider.tokenizer.apply_chat_template(user(content), add_generation_prompt=True)
        expected = server.generation.call(
            lambda: generate(provider.model, provider.tokenizer, prompt, max_tokens=14, prefill_step_size=256)
        )
        client = Client(server)
        told = client.chat(content, max_tokens=14)
        assert text_of(told) == expected
        assert text_of(client.chat(content, max_tokens=14)) == expected
        if provider.config.cache == "budget":
            assert told["mlx_dsa"]["entries_kept"] <= provider.config.top_k
        assert told["mlx_dsa"]["tokens_seen"] == told["usage"]["total_tokens"]
