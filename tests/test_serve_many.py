"""Many clients at once, each with a fact of its own; and caches that are no rows of a batch."""

import json
import random
import threading
import time

import pytest
from serving import Client, idle, long_text, serving, text_of, user, wait_until
from test_serve_bounds import send_chat

WORDS = """marigold copper lantern walnut harbour velvet cinder meadow
saffron pebble thistle anchor juniper amber willow slate"""
PLACES = """mill tower bridge market school chapel garden station
harbour castle library bakery theatre museum stable forge"""
FACTS = list(zip(PLACES.split(), WORDS.split()))


def asked(place, word, n=120):
    text = f"The password of the {place} is {word}. "
    return user(f"{long_text(n, place)}{text}{long_text(n // 2, place)}\n\nWhat is the password of the {place}?")


def ask_all(server, requests, chance=None):
    """Ask all at once; return answers by place. With chance, a third goes away."""
    answers, failed = {}, []

    def ask(key, body):
        try:
            if chance is not None:
                time.sleep(chance.random())
            client = Client(server)
            answers[key] = text_of(client.chat(**body))
            client.close()
        except Exception as error:
            failed.append(error)

    def leave(body):
        connection = send_chat(server, **body)
        time.sleep(chance.random())
        connection.close()

    threads = [threading.Thread(target=ask, args=item) for item in requests.items()]
    if chance is not None:
        others = list(requests.values())[::2]
        threads += [
            threading.Thread(target=leave, args=({"messages": b["content"], "max_tokens": 300},)) for b in others
        ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    return answers


@pytest.fixture(scope="module")
def server():
    with serving(snapshot_bytes=0, decode_concurrency=12, prompt_concurrency=4) as running:
        yield running


def bodies():
    return {place: dict(content=asked(place, word), max_tokens=16) for place, word in FACTS}


def test_sixteen_at_once_answer_as_each_alone(server):
    requests = bodies()
    alone = {place: text_of(Client(server).chat(**body)) for place, body in list(requests.items())}
    # The control: answers differ, and most know their fact.
    assert len(set(alone.values())) == len(FACTS)
    assert sum(word in alone[place] for place, word in FACTS) > len(FACTS) / 2
    assert ask_all(server, requests) == alone
    assert ask_all(server, requests, random.Random(1)) == alone
    wait_until(lambda: idle(server))
    assert server.generation.gauges["queue_length"] == 0 and server.metrics["requests_cancelled"] > 0


def test_rows_are_read_and_written_together(server):
    most = []
    done = threading.Event()

    def watch():
        while not done.wait(0.005):
            most.append(server.generation.gauges.get("rows_decoding", 0))

    thread = threading.Thread(target=watch)
    thread.start()
    ask_all(server, {i: dict(content="Hi", max_tokens=30, logit_bias={"2": -100, "0": -100}) for i in range(8)})
    done.set()
    thread.join()
    assert max(most) >= 4


# One at a time: caches without merge.


@pytest.fixture(scope="module")
def alone(request):
    """A model of which a layer is left dense goes one after the other."""
    with serving(dense=False, config=dict(dense_layers=(0,)), prompt_chunk=128) as s:
        assert not s.provider.is_batchable
        yield s


def test_one_after_the_other_answers_all(alone):
    requests = dict(list(bodies().items())[:4])
    single = {place: text_of(Client(alone).chat(**body)) for place, body in requests.items()}
    assert ask_all(alone, requests) == single


def test_one_at_a_time_a_stop_text_a_seed_and_probabilities(alone):
    client = Client(alone)
    whole = text_of(client.chat("Hi there", max_tokens=8))
    told = client.chat("Hi there", max_tokens=8, stop=whole[3:6], logprobs=True, top_logprobs=1)
    assert text_of(told) == whole[: whole.index(whole[3:6])] and told["choices"][0]["logprobs"]["content"]
    ask = dict(max_tokens=8, temperature=1.5, seed=3)
    assert text_of(client.chat("Hi there", **ask)) == text_of(client.chat("Hi there", **ask))
    assert told["mlx_dsa"]["entries_kept"] > 0


def test_one_at_a_time_a_client_that_goes_makes_room(alone):
    before = alone.metrics["tokens_read"]
    connection = send_chat(alone, messages=user(long_text(9000)))
    wait_until(lambda: alone.metrics["tokens_read"] > before)
    connection.close()
    wait_until(lambda: idle(alone), 5)
    assert alone.metrics["tokens_read"] - before < 9000
    connection = send_chat(alone, max_tokens=5000, logit_bias={"2": -100, "0": -100})
    wait_until(lambda: alone.generation.gauges.get("rows_decoding") == 1)
    began = time.monotonic()
    assert alone.generation.call(lambda: 1) == 1 and time.monotonic() - began < 2
    connection.close()
    wait_until(lambda: idle(alone), 5)


def test_one_at_a_time_progress_is_told(alone):
    events = Client(alone).stream(long_text(700), max_tokens=2, return_progress=True)
    told = [event["prompt_progress"] for event in events if "prompt_progress" in event]
    assert len(told) > 3 and told[-1]["processed"] == told[-1]["total"]
    assert json.dumps(told[-1])
