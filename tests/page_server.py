"""A small server that speaks what the page asks of ``mlx-dsa serve``, with canned answers and no model."""

import base64
import json
import random
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from mlx_dsa.serve import pages

LAYERS = 36
ENTRY = 147_456  # bytes of a token in all layers of Qwen3-8B
STATISTICS = {
    "tokens_seen": 3881,
    "entries_kept": 1001,
    "kv_bytes": 1001 * ENTRY,
    "dense_kv_bytes": 3881 * ENTRY,
    "prompt_tps": 1912.0,
    "generation_tps": 41.27,
    "first_token_s": 0.38,
}
READ = ("kitchen.", "key", "motor", "lower", "store,", "blue", "spare")
TIDES = """\
The harbour of Skarrow, a handbook for new keepers

1. The light

The lamp stands 31 metres above high water and shows two white flashes every 15 seconds. It is lit at sunset and put
out at sunrise. If the motor stops, the spare one is in the lower store, behind the blue door; the key hangs in the
kitchen. Write down the hour at which it stopped, even if it runs again by itself.

2. The tides

High water comes about fifty minutes later each day. The causeway is dry for three hours on either side of low water.
Nobody crosses on foot after the bell has rung twice. In the winter of 1987 the water stood at 4.6 metres, the highest
mark on the wall, and the lower store was flooded to the second shelf.

3. The boats

Eleven boats are at home here. The ferry Marit leaves at 07:20 and 16:45, on Sundays only at 10:00. The pilot is called
on channel 12. Fishing boats tell by radio when they leave and when they are back; a boat that is two hours late is
looked for.

4. The weather

The glass is read at six in the morning, at noon and at six in the evening. When it falls more than six millibars in
three hours, the storm cone is hoisted and the ferry is told to stay. Fog is announced with one long stroke of the horn
each minute. The old keeper, Ingrid Halvorsen, held that gulls on the meadow mean wind before night;
she was mostly right.

5. The stores

Oil for the spare motor is enough for nine days. Bread comes with the ferry on Tuesdays and Fridays. The cat belongs to
the house and is to be fed, whatever it says.
"""
TIDES = re.sub(r"(?<!\n)\n(?=\w)", " ", TIDES)
ANSWERS = {
    "think": ([("reasoning", "The person greets me. "), ("reasoning", "I greet back.")], "Hello! How can I help?"),
    "code": (
        [],
        'Here it is:\n\n```python\nfor name in names:\n    print(f"<b>{name}</b>")\n```\n\nIt prints <b>names</b>.',
    ),
    "markup": ([], "<img src=x onerror=\"document.title='broken'\"> <script>document.title='broken'</script> & done."),
    "fence": ([], "One ``` in a line.\n~~~\ncode without an end"),
    "key": (
        [],
        "It hangs in the kitchen. The spare motor itself is in the lower store, behind the blue door.\n\n"
        "If the motor stops, write down the hour, even if it runs again by itself.",
    ),
}


def pieces_of(text):
    """Cut a text as a tokenizer would: words with the white space before them."""
    return re.findall(r"\n|[ \t]*[^\s]{1,9}|[ \t]+", text)


def kept_of(pieces):
    """Keep names, numbers and long words in more layers than the rest, the same for each call."""
    chance = random.Random(7)
    shares = []
    for piece in pieces:
        word = piece.strip()
        heavy = bool(re.search(r"\d|^[A-Z]", word)) + (len(word) > 6)
        shares.append((0.01, 0.4, 0.85)[2 if word in READ else heavy] if word else 0.005)
    rows = []
    for layer in range(LAYERS):
        bits = [chance.random() < share * (0.6 + 0.02 * layer) for share in shares]
        bits += [False] * (-len(bits) % 8)
        packed = bytes(sum(bit << (7 - i) for i, bit in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8))
        rows.append(base64.b64encode(packed).decode())
    return rows


class Handler(BaseHTTPRequestHandler):
    """One request; ``self.server`` holds what the test sets and what was seen."""

    def log_message(self, *ignored):
        """Say nothing."""

    def answer(self, body, status=200, kind="application/json", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status, message, **headers):
        self.answer({"error": {"message": message, "type": "error", "code": None}}, status, **headers)

    def stream(self, events, ended=True):
        """Send events; note a client that goes away."""
        gone = self.server.gone  # of this test: the next one has its own
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self.wfile.write(b": a comment keeps the line open\n\n")
            for event in events:
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                self.wfile.flush()
                time.sleep(self.server.pause)
            if ended:
                self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            gone.append(self.path)

    def handle_one(self):
        """Answer a request, whatever its method."""
        server, path = self.server, self.path.split("?")[0]
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        server.seen.append((self.command, self.path, body))
        found = pages.static_file(path)
        if found:
            return self.answer(found[0], kind=found[1], **pages.HEADERS)
        if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
            return self.refuse(401, "wrong or missing API key")
        if path == "/v1/models":
            return self.answer({"object": "list", "data": [{"id": "mlx-community/Qwen3-8B", "object": "model"}]})
        if path == "/v1/chat/completions":
            return self.chat(body)
        if path == "/v1/documents":
            if self.command == "POST":
                return self.stream(self.reading(body))
            return self.answer({"object": "list", "data": list(server.documents.values())})
        part = path.split("/")
        if part[:3] == ["", "v1", "documents"] and part[3] in server.documents:
            return self.document(part[3], part[4:])
        return self.refuse(404, f"there is nothing at {path}")

    do_GET = do_POST = do_DELETE = handle_one

    def document(self, name, rest):
        server = self.server
        if self.command == "DELETE":
            del server.documents[name]
            return self.answer({"id": name, "object": "document.deleted", "deleted": True})
        pieces = pieces_of(server.texts[name])
        if rest == ["kept"]:
            return self.answer({"pieces": pieces, "layers": list(range(LAYERS)), "kept": kept_of(pieces)})
        wanted = [i for word in READ for i, piece in enumerate(pieces) if piece.strip() == word][:49]
        wanted.append(pieces.index("\n"))
        return self.answer({"read": [[token, round(0.2 / (1 + rank / 4), 4)] for rank, token in enumerate(wanted)]})

    def reading(self, body):
        """Yield the progress of a document, then the document."""
        text, server = body["text"], self.server
        total = len(pieces_of(text))
        for step in range(0, total + 1, max(1, total // 10)):
            yield {"object": "document.progress", "tokens": step, "total": total}
        yield server.add(body["name"], text)

    def chat(self, body):
        question = body["messages"][-1]["content"]
        if body.get("document", "") not in ("", *self.server.documents):
            return self.refuse(404, f"there is no document {body['document']}")
        if question == "refused":
            return self.refuse(400, "the prompt has 90,000 tokens; this server takes 40,000")
        if question == "busy":
            return self.refuse(503, "all places are taken.", **{"Retry-After": "5"})
        if question == "plain":
            return self.answer(b"<h1>Bad gateway</h1>", 502, "text/html")
        return self.stream(self.words(question), ended=question != "broken")

    def words(self, question):
        """Yield the events of one answer."""
        for done in (512, 1024, 2048):
            yield {"prompt_progress": {"total": 2048, "cache": 512, "processed": done, "time_ms": 10 * done}}
        first, text = ANSWERS.get(question.rstrip("?").split()[-1], ([], f"You said: {question}. That is all."))
        for name, piece in first:
            yield self.chunk({name: piece})
        if question == "inner":
            yield {"error": {"message": "the model ran out of memory", "type": "error", "code": 500}}
        while question == "endless":
            yield self.chunk({"content": "more and "})
        if question == "silence":
            return
        for at in range(0, len(text), 5):
            yield self.chunk({"content": text[at : at + 5]})
        if question == "broken":
            return
        yield self.chunk({}, "length" if question == "cut" else "stop")
        usage = {"prompt_tokens": 2048, "completion_tokens": 24, "prompt_tokens_details": {"cached_tokens": 512}}
        known = {"generation_tps": 9.0, "kv_bytes": None} if question == "little" else STATISTICS
        yield {"object": "chat.completion.chunk", "choices": [], "usage": usage, "mlx_dsa": known}

    @staticmethod
    def chunk(delta, reason=None):
        return {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


class PageServer(ThreadingHTTPServer):
    """The server, on a free port of the loopback address."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.reset()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def reset(self):
        """Forget what was seen and set."""
        self.seen, self.gone, self.documents, self.texts = [], [], {}, {}
        self.key, self.pause = None, 0.002

    def add(self, name, text):
        """Hold a document, as if it had been read."""
        key = f"doc-{abs(hash(text)) % 16**8:08x}"
        total = len(pieces_of(text))
        facts = {"tokens": total, "entries": total // 4, "bytes": ENTRY * (total // 4), "created": 1_790_000_000}
        self.documents[key] = {"id": key, "object": "document", "name": name, "status": "ready", **facts}
        self.texts[key] = text
        return self.documents[key]
