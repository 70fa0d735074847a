"""Read a text of any length with the bundled model, and ask about its first, middle and last page.

    python tests/long_text.py 1000000 --data books.txt --out long.json --plot long.png

Without --data the bundled books are read over and over. A million tokens take about twenty minutes
on two cores; a line for each 20,000 tokens tells how far it is.
"""

import argparse
import itertools
import json
import random
import time
from pathlib import Path

from mlx_dsa import load_preset, patch_sparse_generate  # before MLX, for OpenBLAS

# isort: split
import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from mlx_dsa.pictures import save_picture
from mlx_dsa.tasks.documents import load_documents
from mlx_dsa.tasks.facts import make_facts
from mlx_dsa.tasks.prompts import frame

# Pages, and where on a page of 600 tokens its facts stand.
PAGES, ON_PAGE = ("first", "middle", "last"), (100, 300, 500)
CHUNK, EVERY = 512, 40  # tokens of a call, calls a line


def make_text(n, tokenizer, data, facts):
    """Return `n` tokens of prose with three facts on each of PAGES, in the chat format, without its end."""

    def encode(text):
        return list(tokenizer.encode(text, add_special_tokens=False))

    texts = [Path(data).read_text(encoding="utf-8")] if data else [d.text for d in load_documents(None)]
    hidden = [encode(f"\n\n{fact.sentence}\n\n") for fact in facts]
    head, end, ids = encode(frame(tokenizer).head), encode("\n\n"), []
    room = n - len(head) - len(end) - sum(map(len, hidden))
    for text in itertools.cycle(texts):
        ids += encode(text + "\n\n")
        if len(ids) >= room:
            break
        if data:
            raise ValueError(f"[long_text] {data} has {len(ids):,} tokens, not {n:,}. Give a longer file.")
    ids = ids[:room]
    starts = (0, room // 2 - 300, room - 600)
    places = [start + at for start in starts for at in ON_PAGE]
    for place, fact in sorted(zip(places, hidden), reverse=True):
        ids[place:place] = fact
    return head + ids + end


def read(n, top_k=512, data=None, tell=lambda line: None):
    """Read, ask, and return what memory, time and answers were.

    Args:
        n (int): Tokens.
        top_k (int): Entries that are kept a layer. Default: ``512``.
        data (str): A text file. Default: ``None``, the bundled books.
        tell (callable): Takes what is known after every 20,000 tokens.
    """
    model, tokenizer, indexers, _ = load_preset("tiny")
    facts = make_facts(random.Random(1), 9, value="digits", entities="heldout", phrasing="train")
    ids = make_text(n, tokenizer, data, facts)
    rules = dict(top_k=top_k, n_recent=top_k // 4, prefill="stream", stream_chunk=CHUNK, positions="compact")
    rows, answers = [], []
    with patch_sparse_generate(model, indexers, **rules) as patch:
        caches, began = make_prompt_cache(model), time.perf_counter()
        with patch.reading(caches):
            for call, start in enumerate(range(0, len(ids), CHUNK)):
                model(mx.array([ids[start : start + CHUNK]]), caches)
                mx.eval([c.state for c in caches])
                if call % EVERY == 0:
                    row = {"tokens": start + CHUNK, "seconds": time.perf_counter() - began}
                    row |= {"active_mb": mx.get_active_memory() / 1e6, "peak_mb": mx.get_peak_memory() / 1e6}
                    rows.append(row | {"entries": max(c.size() for c in caches)})
                    tell(rows[-1])
        for page, fact in zip((p for p in PAGES for _ in ON_PAGE), facts):
            question = tokenizer.encode(fact.question + frame(tokenizer).tail, add_special_tokens=False)
            steps = generate_step(mx.array(question), model, max_tokens=24, prompt_cache=[c.copy() for c in caches])
            written = (int(token) for token, _ in steps)
            said = tokenizer.decode(list(itertools.takewhile(lambda t: t not in tokenizer.eos_token_ids, written)))
            answers.append({"page": page, "value": fact.value, "reply": said, "right": fact.value in said})
    about = {"tokens": len(ids), "rules": rules, "data": data and Path(data).name}
    return {**about, "rows": rows, "answers": answers}


def draw(found, path):
    """Draw memory and time over the text."""

    def figure(plt):
        rows = found["rows"]
        x = [r["tokens"] / 1000 for r in rows]
        made, (memory, clock) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        for key, label in (("peak_mb", "most at once"), ("active_mb", "in use")):
            memory.plot(x, [r[key] for r in rows], label=label)
        memory.set(title="Memory, weights included", ylabel="MB", ylim=(0, None))
        memory.legend(frameon=False)
        clock.plot(x, [r["seconds"] for r in rows])
        clock.set(title="Time to read", ylabel="seconds", ylim=(0, None))
        for axis in (memory, clock):
            axis.set_xlabel("thousand tokens")
            axis.grid(alpha=0.25)
        right = sum(a["right"] for a in found["answers"])
        made.suptitle(
            f"The bundled model on {found['tokens']:,} tokens, {found['rules']['top_k']} entries a layer: "
            f"{right} of {len(found['answers'])} questions answered"
        )
        return made

    save_picture(figure, path, font_size=9)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokens", type=int)
    parser.add_argument("--top-k", type=int, default=512)
    parser.add_argument("--data")
    parser.add_argument("--out")
    parser.add_argument("--plot")
    args = parser.parse_args()
    result = read(args.tokens, args.top_k, args.data, tell=lambda row: print(json.dumps(row), flush=True))
    for answer in result["answers"]:
        print(json.dumps(answer))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        draw(result, args.plot)
