"""Whether many clients of `mlx-dsa serve` get the answers that each would get alone, and what they leave behind.

    python eval/serve_soak.py --requests 2000 --out eval/results/serve/soak.json

starts a server with a folder, and asks it at random moments: short texts with a fact of their own (some longer than the
budget), questions about shared documents, and second turns. Of the requests a share is cancelled, by closing the
connection at a random moment: while it waits, is read, or is written. Then

- every complete answer is compared with that of the same request alone, on a server that keeps nothing between
  requests. A second turn goes on from what the first has left, if that is still there: where its answer differs, it is
  compared with that of the same two turns alone on a server that keeps all, and on one that cuts what it keeps. One
  that still differs is a tie if the two best tokens at the first difference are within 1e-3 (log-probability), else a
  fault.
- the queue and the rows must be empty, and memory that of after the first hundred requests within 2%. The bound of
  what is kept between requests is small, so that it is full by then: nothing is subtracted. What MLX holds is compared
  as it is. What the process has resident goes up and down by some 10% from one time of rest to the next (free pages
  between those in use), so it is read at six of them, and the least of the last three compared with that of the first.
- the server is killed (SIGKILL) while it reads a document and answers, three times, and started again with the same
  folder: each document must be there and answer as before, or be absent.
"""

import argparse
import http.client
import json
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import mlx_dsa  # noqa: F401  (before MLX: it says which BLAS that uses)

# isort: split
from mlx_dsa.machine import device, versions

TIE, LEEWAY, WARM = 1e-3, 0.02, 100
PLACES = "mill tower bridge market school chapel garden station harbour castle library bakery theatre museum".split()
WORDS = "marigold copper lantern walnut velvet cinder meadow saffron pebble thistle anchor juniper amber slate".split()
FILLERS = (
    "On day {i} the {place} was calm and nobody came. ",
    "The roof of the {place} was mended in year {i}. ",
    "A man sold {i} apples beside the {place}. ",
)


class Server:
    """A server in a process of its own."""

    def __init__(self, preset, *options):
        command = [sys.executable, "-m", "mlx_dsa", "serve", "--preset", preset, "--port", "0", *options]
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True)
        line = self.process.stdout.readline()
        if not (found := re.search(r"http://([\d.]+):(\d+)", line)):
            self.log.seek(0)
            raise SystemExit(f"The server did not start: {self.log.read()[-2000:]}")
        self.address = found[1], int(found[2])

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.ended = self.process.wait(60)

    def send(self, method, path, body=None, timeout=600):
        """Return the status and what JSON or text is answered."""
        connection = http.client.HTTPConnection(*self.address, timeout=timeout)
        try:
            connection.request(method, path, body and json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            raw = answer.read().decode()
            return answer.status, json.loads(raw) if answer.headers.get_content_type() == "application/json" else raw
        finally:
            connection.close()

    def chat(self, body):
        """Return the answer to a request, its tokens that were known, and its log-probabilities."""
        status, told = self.send("POST", "/v1/chat/completions", body)
        if status != 200:
            raise RuntimeError(f"{status}: {told}")
        choice, usage = told["choices"][0], told["usage"]
        logprobs = (choice.get("logprobs") or {}).get("content")
        return choice["message"]["content"], usage["prompt_tokens_details"]["cached_tokens"], logprobs

    def begin(self, body):
        """Send a request; return the connection."""
        raw = json.dumps(body).encode()
        connection = socket.create_connection(self.address, timeout=600)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        return connection

    def metrics(self):
        text = self.send("GET", "/metrics")[1]
        return {name: float(value) for name, value in re.findall(r"^mlx_dsa_(\w+) ([\d.e+]+)$", text, re.M)}

    def memory(self):
        """Return what the process and MLX hold, once nothing is asked."""
        end = time.monotonic() + 120
        while any((now := self.metrics())[n] for n in ("queue_length", "rows_reading", "rows_decoding")):
            if time.monotonic() > end:
                break
            time.sleep(0.2)
        time.sleep(3)  # an idle server gives back what it has freed
        now = self.metrics()
        names = ("queue_length", "rows_reading", "rows_decoding", "memory_bytes", "snapshot_bytes", "snapshots")
        return {"resident_bytes": self._resident(), **{name: int(now[name]) for name in names}}

    def _resident(self):
        try:
            text = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:  # only Linux tells it
            return 0
        return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) << 10

    def documents(self):
        return {d["name"]: d["id"] for d in self.send("GET", "/v1/documents")[1]["data"]}


def text_with(fact, n_sentences, chance):
    """Return some sentences with a fact among them."""
    said = [
        chance.choice(FILLERS).format(i=chance.randrange(1000), place=chance.choice(PLACES)) for _ in range(n_sentences)
    ]
    said.insert(chance.randrange(len(said) + 1), fact)
    return "".join(said)


def make_documents(chance, n=4):
    facts = [(f"{chance.choice(PLACES)} {i}", chance.choice(WORDS)) for i in range(n)]
    texts = {p: text_with(f"The password of the {p} is {w}. ", chance.randrange(20, 80), chance) for p, w in facts}
    return facts, texts


def make_plans(args, chance, facts, ids):
    """Return what is asked: conversations of one turn or two, each turn with whether it is cancelled."""
    plans, n = [], 0
    while n < args.requests:
        place, word = f"{chance.choice(PLACES)} {len(plans)}", chance.choice(WORDS)
        kind = chance.choices(["short", "long", "document", "turns"], [35, 25, 20, 20])[0]
        question, document = f"What is the password of the {place}?", None
        if kind == "document":
            (place, word), document = facts[chance.randrange(len(facts))], None
            ways = "What is the password of the {}?", "Tell me the password of the {}.", "Which password has the {}?"
            turns, document = [chance.choice(ways).format(place)], ids[place]
        else:
            n_sentences = chance.randrange(22, 42) if kind == "long" else chance.randrange(0, 18)
            if kind == "turns":
                n_sentences = chance.randrange(0, 30)
            text = text_with(f"The password of the {place} is {word}. ", n_sentences, chance)
            turns = [f"{text}\n\n{question}"]
            if kind == "turns":
                turns.append(f"Say it once more. {question}")
        turns = [(turn, chance.random() < args.cancel, chance.random() < 0.5) for turn in turns]
        options = {"max_tokens": chance.choice([1, 8, 16, 24]), "temperature": 0}
        plans.append({"kind": kind, "word": word, "turns": turns, "options": options, "document": document})
        n += len(turns)
    return plans


class Traffic:
    """Clients, each with one request at a time."""

    def __init__(self, server, plans, n_clients, chance):
        self.server, self.answers, self.failures, self.counts = server, [], [], Counter()
        self._plans, self._took, self._lock = queue.SimpleQueue(), [0.5], threading.Lock()
        for plan in plans:
            self._plans.put((plan, random.Random(chance.random())))
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(n_clients)]

    def run(self):
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.join()
        print(f"{len(self.answers)} answers, {dict(self.counts)}", file=sys.stderr, flush=True)

    def _work(self):
        while True:
            try:
                plan, chance = self._plans.get_nowait()
            except queue.Empty:
                return
            try:
                self._converse(plan, chance)
            except Exception as error:
                self.failures.append(f"{plan['kind']}: {type(error).__name__}: {error}"[:300])

    def _converse(self, plan, chance):
        messages = []
        for turn, cancelled, streams in plan["turns"]:
            time.sleep(chance.expovariate(5))
            messages = [*messages, {"role": "user", "content": turn}]
            body = {"messages": messages, **plan["options"]}
            if plan["document"] is not None:
                body["document"] = plan["document"]
            if cancelled:
                return self._cancel({**body, "max_tokens": 200, "stream": streams}, chance)
            began = time.monotonic()
            text, cached = self._stream(body) if streams else self.server.chat(body)[:2]
            with self._lock:
                self._took = [*self._took, time.monotonic() - began][-50:]
                self.answers.append({"plan": plan, "body": body, "text": text, "cached": cached})
                self.counts["streamed" if streams else "at once"] += 1
            messages = [*messages, {"role": "assistant", "content": text}]

    def _stream(self, body):
        with self.server.begin({**body, "stream": True, "stream_options": {"include_usage": True}}) as connection:
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            lines = [line[6:].strip() for line in answer if line.startswith(b"data: ")]
        if answer.status != 200 or not lines or lines.pop() != b"[DONE]":
            raise RuntimeError(f"a stream of status {answer.status} ended early: {lines[-1:]}")
        told = [json.loads(line) for line in lines]
        text = "".join(t["choices"][0]["delta"].get("content") or "" for t in told if t["choices"])
        return text, told[-1]["usage"]["prompt_tokens_details"]["cached_tokens"]

    def _cancel(self, body, chance):
        """Go away: at once, after some time, or after some of the answer."""
        connection = self.server.begin(body)
        how = chance.choice(["at once", "later", "later", "while it is written"])
        if how == "later":
            time.sleep(chance.random() * 1.5 * sorted(self._took)[len(self._took) // 2])
        elif how == "while it is written":
            connection.settimeout(1)
            with suppress(TimeoutError):
                for _ in range(chance.randrange(1, 8)):
                    connection.recv(2000)
        connection.close()
        with self._lock:
            self.counts[f"cancelled {how}"] += 1


def compare(args, answers, texts, names):
    """Compare answers with those of the same requests alone."""
    counts, different = Counter(), []
    options = {
        "continued": ("--snapshot-bytes", "2GB"),
        # A state before it is cut is larger than a quarter of this, one that was cut is not.
        "cut": ("--snapshot-bytes", "9MB"),
    }
    known = {}
    with Server(args.preset, "--snapshot-bytes", "0") as server:
        ids = read_documents(server, texts)
        for i, answer in enumerate(answers):
            if i % 100 == 0:
                print(f"{i} of {len(answers)} asked alone", file=sys.stderr, flush=True)
            body = alone(answer["body"], names, ids)
            key = json.dumps(body, sort_keys=True)
            if key not in known:
                known[key] = server.chat({**body, "logprobs": True, "top_logprobs": 2})
            expected, _, logprobs = known[key]
            counts["knew the fact"] += answer["plan"]["word"] in answer["text"]
            if answer["text"] == expected:
                counts["as alone"] += 1
            else:
                different.append((answer, expected, logprobs))
    for name, more in options.items():
        if not (left := [d for d in different if len(d[0]["body"]["messages"]) > 1 and d[0]["cached"]]):
            break
        with Server(args.preset, *more) as server:
            for one in left:
                body = one[0]["body"]
                server.chat({**body, "messages": body["messages"][:1]})
                if server.chat(body)[0] == one[0]["text"]:
                    counts[f"as alone, {name}"] += 1
                    different.remove(one)
    faults = []
    for answer, expected, logprobs in different:
        at, gap = first_difference(answer["text"], expected, logprobs)
        counts["ties" if gap < TIE else "faults"] += 1
        faults.append({"kind": answer["plan"]["kind"], "cached": answer["cached"], "token": at, "gap": gap,
                       "text": answer["text"], "alone": expected, "body": answer["body"]})  # fmt: skip
    return dict(counts), faults


def alone(body, names, ids):
    """Return a request for another server, which has other ids of the same documents."""
    return {**body, "document": ids[names[body["document"]]]} if "document" in body else body


def first_difference(text, expected, logprobs):
    """Return at which token answers differ, and how far apart the two best were there."""
    said = ""
    for i, token in enumerate(logprobs):
        said = (said + token["token"]).lstrip()
        if not text.startswith(said):
            best = sorted((other["logprob"] for other in token["top_logprobs"]), reverse=True)
            return i, best[0] - best[1]
    return len(logprobs), float("inf")


def read_documents(server, texts):
    for name, text in texts.items():
        status, told = server.send("POST", "/v1/documents", {"text": text, "name": name})
        if status != 200:
            raise RuntimeError(f"{status}: {told}")
    return server.documents()


def kill_and_restart(args, server, store, facts, texts, chance):
    """Kill a server while it works, three times; return what was there each time."""

    def ask(server, ids):
        question = "What is the password of the {}?"
        bodies = [{"messages": [{"role": "user", "content": question.format(p)}], "document": ids[p], "max_tokens": 16,
                   "temperature": 0} for p in texts if p in ids]  # fmt: skip
        return {p: server.chat(body)[0] for p, body in zip((p for p in texts if p in ids), bodies)}

    before, rounds = ask(server, server.documents()), []
    for i in range(3):
        new = text_with(f"The password of the vault {i} is {chance.choice(WORDS)}. ", 300, chance)
        threads = [threading.Thread(target=quietly, args=(server.send, "POST", "/v1/documents",
                                                          {"text": new, "name": f"vault {i}"}))]  # fmt: skip
        body = {"messages": [{"role": "user", "content": text_with("", 30, chance)}], "max_tokens": 100}
        threads += [threading.Thread(target=quietly, args=(server.chat, body)) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.5 + 2 * chance.random())
        server.process.kill()
        server.process.wait()
        for thread in threads:
            thread.join()
        server = Server(args.preset, *args.options, "--store", store)
        ids = server.documents()
        there = ask(server, ids)
        rounds.append({"documents": len(there), "as before": sum(there[p] == before[p] for p in there),
                       "half read there": f"vault {i}" in ids})  # fmt: skip
        if f"vault {i}" in ids:
            question = {"role": "user", "content": f"What is the password of the vault {i}?"}
            server.chat({"messages": [question], "document": ids[f"vault {i}"], "max_tokens": 8})
    with server:
        pass
    return {"rounds": rounds, "ended": server.ended, "parts left": len(list(Path(store).rglob("*part*")))}


def quietly(function, *arguments):
    try:
        function(*arguments)
    except (OSError, http.client.HTTPException, RuntimeError, ValueError):
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--cancel", type=float, default=0.33, help="share of the requests that are cancelled")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--snapshot-bytes", default="24MB")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.options = ("--snapshot-bytes", args.snapshot_bytes, "--max-queue", str(4 * args.clients))
    chance = random.Random(args.seed)
    facts, texts = make_documents(chance)
    with tempfile.TemporaryDirectory() as store:
        server = Server(args.preset, *args.options, "--store", store)
        ids = read_documents(server, texts)
        names = {ident: name for name, ident in ids.items()}
        plans = make_plans(args, chance, facts, ids)
        began, n, first = time.monotonic(), 0, []
        while n < min(WARM, args.requests):
            first.append(plans.pop(0))
            n += len(first[-1]["turns"])
        pieces = [first, *(plans[len(plans) * i // 5 : len(plans) * (i + 1) // 5] for i in range(5))]
        parts = [Traffic(server, plan, args.clients, chance) for plan in pieces]
        memory = []
        for part in parts:
            part.run()
            memory.append(server.memory())
        seconds = time.monotonic() - began
        counters = {k: int(v) for k, v in server.metrics().items() if k.endswith("_total")}
        answers = [answer for part in parts for answer in part.answers]
        failures = [failure for part in parts for failure in part.failures]
        killed = kill_and_restart(args, server, store, facts, texts, chance)
    counts, differences = compare(args, answers, texts, names)
    first, last = memory[0], memory[-1]
    resident = [m["resident_bytes"] for m in memory]
    grown = {"memory_bytes": last["memory_bytes"] / first["memory_bytes"] - 1}
    if resident[0]:
        grown["resident_bytes"] = min(resident[3:]) / min(resident[:3]) - 1
    idle = not (last["queue_length"] or last["rows_reading"] or last["rows_decoding"])
    held = all(r["as before"] == r["documents"] == len(texts) for r in killed["rounds"])
    passes = {
        "no failures": not failures and not counters["failures_total"],
        "idle": idle,
        "as alone": not counts.get("faults"),
        "memory": all(g < LEEWAY for g in grown.values()),
        "killed": held,
    }
    result = {
        "passes": passes,
        "arguments": {k: v for k, v in vars(args).items() if k not in ("out", "options")},
        "seconds": round(seconds, 1),
        "answers": len(answers),
        "compared": counts,
        "differences": differences,
        "sent": dict(sum((part.counts for part in parts), Counter())),
        "failures": failures,
        "memory": memory,
        "grown": grown,
        "counters": counters,
        "killed": killed,
        "device": device(),
        "versions": versions(),
    }
    print(json.dumps(result, indent=1))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(not all(passes.values()))


if __name__ == "__main__":
    main()
