"""How long clients wait: `mlx-dsa serve` beside `mlx_lm.server`, dense, on the same model and requests.

    python eval/serve_speed.py --out eval/results/serve/speed.json
    python eval/serve_speed.py --clients 8 --tokens 8192 --answer 200 --serve "--prefill stream --positions compact"

starts each server in turn as a process of its own, `--repeats` times. Every client sends a text of its own at once and
wants an answer of so many tokens (the end token is forbidden). Then one client asks a text that no server has seen, and
asks it again with another question; the time to the first token is told for both. Texts are a book's, from `--text`
or made of the bundled word lists, so a prompt is the same for both servers. The server's own memory is what its
process holds at the end. Medians over the repeats.
"""

import argparse
import json
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection
from pathlib import Path

from mlx_dsa.machine import device, versions
from mlx_dsa.presets import load_preset, resolve

KINDS = ("dense", "sparse")
# mlx-lm's own server. On a CPU it gets what mlx-dsa takes there by itself, or it would be many times slower:
# OpenBLAS, which importing mlx_dsa loads, and numbers in float32.
_DENSE = """
import mlx_dsa
import mlx.core as mx
from mlx_dsa.machine import runs_float32
from mlx_lm import server

load = server.load

def as_here(*arguments, **options):
    model, *others = load(*arguments, **options)
    if runs_float32():
        model.set_dtype(mx.float32)
    return model, *others

server.load = as_here
server.main()
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """A server in a process of its own, and clients that ask it."""

    def __init__(self, kind, args):
        self.port, self.kind = free_port(), kind
        if kind == "dense":
            command = [sys.executable, "-c", _DENSE, "--model", args.model_path]
            command += ["--prefill-step-size", str(args.chunk), "--prompt-cache-size", "64"]
        else:
            command = [sys.executable, "-m", "mlx_dsa", "serve", *args.model_options, *args.serve.split()]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        self.log = open(f"{args.logs}/{kind}.log", "a")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        for _ in range(600):
            try:
                if self.get("/health") == 200:
                    return
            except OSError:
                pass
            if self.process.poll() is not None:
                raise SystemExit(f"The {kind} server ended: see {self.log.name}")
            time.sleep(0.2)
        raise SystemExit(f"The {kind} server does not answer: see {self.log.name}")

    def get(self, path):
        connection = HTTPConnection("127.0.0.1", self.port, timeout=5)
        connection.request("GET", path)
        status = connection.getresponse().status
        connection.close()
        return status

    def ask(self, text, n, forbidden):
        """Return seconds to the first and the last token, and tokens of the answer and those known."""
        body = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": n,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logit_bias": {str(token): -100 for token in forbidden},
        }
        start, first, usage = time.perf_counter(), None, {}
        connection = HTTPConnection("127.0.0.1", self.port, timeout=3600)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise SystemExit(f"{self.kind}: {response.status} {response.read()[:300]}")
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            told = json.loads(line[6:])
            delta = [c.get("delta", {}) for c in told.get("choices", ())]
            if first is None and any(d.get("content") or d.get("reasoning") for d in delta):
                first = time.perf_counter() - start
            usage = told.get("usage") or usage
        connection.close()
        cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        return first, time.perf_counter() - start, usage["completion_tokens"], usage["prompt_tokens"], cached

    def memory(self):
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024 / 1e9
        return None

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()


def texts_of(args, tokenizer, n):
    """Return texts of about as many tokens, none like another."""
    source = Path(args.text).read_text(encoding="utf-8")
    paragraphs = [p for p in re.split(r"\n\s*\n", source) if len(p) > 80]
    texts = []
    for i in range(n):
        mixed, ids = random.Random(f"{args.seed}-{i}"), []
        text = f"Text {i}.\n\n"
        while len(ids) < args.tokens:
            text += mixed.choice(paragraphs) + "\n\n"
            if len(text) > 2 * args.tokens:
                ids = tokenizer.encode(text)
        texts.append(tokenizer.decode(ids[: args.tokens]))
    return texts


def measure(kind, args, texts, questions, forbidden):
    server = Server(kind, args)
    try:
        server.ask("Say a word.", 4, forbidden)
        told = [None] * args.clients

        def client(i):
            told[i] = server.ask(texts[i], args.answer, forbidden)

        start = time.perf_counter()
        threads = [threading.Thread(target=client, args=(i,)) for i in range(args.clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - start
        if None in told:
            raise SystemExit(f"{kind}: a client got no answer")
        n = sum(t[2] for t in told)
        alone = [server.ask(texts[-1] + "\n\n" + q, 8, forbidden) for q in questions]
        return {
            "tokens_s": n / took,
            "seconds": took,
            "answer_tokens": n,
            "prompt_tokens": sum(t[3] for t in told),
            "last_first_token_s": max(t[0] for t in told),
            "first_question_s": alone[0][0],
            "second_question_s": alone[1][0],
            "second_question_cached": alone[1][4],
            "second_question_prompt": alone[1][3],
            "memory_gb": server.memory(),
        }
    finally:
        server.stop()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--model", help="A folder, for presets that bring no model.")
    parser.add_argument("--indexer")
    parser.add_argument("--serve", default="", help="Further options of mlx-dsa serve.")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--answer", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=2048, help="Tokens of a prompt at once, of mlx_lm.server.")
    parser.add_argument("--text", default="prompts/balloon.txt", help="A file whose paragraphs make the texts.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", default="/tmp")
    parser.add_argument("--out")
    args = parser.parse_args()
    named = {name: getattr(args, name) for name in ("model", "indexer") if getattr(args, name)}
    settings = resolve(args.preset, **named)
    args.model_path = str(settings.model)
    args.model_options = ["--preset", args.preset]
    for name, value in named.items():
        args.model_options += [f"--{name}", value]
    _, tokenizer, *_ = load_preset(args.preset, **named)
    texts = texts_of(args, tokenizer, args.clients + 1)
    questions = ("What is this text about?", "Who is named in it?")
    forbidden = sorted(tokenizer.eos_token_ids)
    passes = {kind: [] for kind in KINDS}
    for repeat in range(args.repeats):
        for kind in KINDS:
            passes[kind].append(measure(kind, args, texts, questions, forbidden))
            line = {k: round(v, 3) if isinstance(v, float) else v for k, v in passes[kind][-1].items()}
            print(f"{repeat + 1} of {args.repeats}, {kind}: {line}", file=sys.stderr, flush=True)
    row = {k: {n: statistics.median(p[n] for p in passes[k]) for n in passes[k][0]} for k in KINDS}
    dense, sparse = row["dense"], row["sparse"]
    row["ratios"] = {
        "tokens_s": sparse["tokens_s"] / dense["tokens_s"],
        "second_question_over_reading": sparse["second_question_s"] / sparse["first_question_s"],
        "second_question_over_dense": sparse["second_question_s"] / dense["second_question_s"],
        "memory": sparse["memory_gb"] / dense["memory_gb"],
    }
    config = {k: v for k, v in vars(args).items() if k not in ("logs", "out", "model_path", "model_options")}
    result = {**row, "passes": passes, "config": config, "device": device(), "versions": versions()}
    print(json.dumps(row["ratios"], indent=1))
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
