"""The kvpress side of eval/kvpress_peer.py: runs presses on the items that it wrote.

Needs torch, transformers and kvpress in a virtual environment of its own; imports nothing of mlx_dsa.
"""

import argparse
import copy
import json
import os
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import kvpress
import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, pipeline

# Float32 on both sides. Rotations of later positions differ more: there the likeliest token decides.
LOGITS_AGREE, AGREE_UNTIL = 1e-4, 1024
MAX_TOKENS = 32


class Changed(kvpress.ScorerPress):
    """A press with one of our conventions after the other put on its scores.

    Args:
        press (ScorerPress): what scores.
        pool (int): positions beside a token that count for it.
        n_sink (int), n_recent (int): first and newest tokens that stay in any case.
    """

    def __init__(self, press, pool=0, n_sink=0, n_recent=0):
        super().__init__(press.compression_ratio)
        self.press, self.pool, self.n_sink, self.n_recent = press, pool, n_sink, n_recent

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        scores = self.press.score(module, hidden_states, keys, values, attentions, kwargs)
        n_heads, length = scores.shape[1:]
        scores = scores.mean(dim=1, keepdim=True)
        if self.pool:
            scores = F.max_pool1d(scores, 2 * self.pool + 1, stride=1, padding=self.pool)
        top = scores.max().item() + 1
        scores[..., : self.n_sink] = top
        scores[..., length - self.n_recent :] = top
        return scores.expand(-1, n_heads, -1).contiguous()


class ManyRatios(kvpress.KVzipPress):
    """KVzip whose scores, made once, serve several ratios: what is masked is left in ``masks``."""

    def compress_post(self, model):
        self.masks = {}
        for ratio in self.ratios:
            self.compression_ratio = ratio
            super().compress_post(model)
            layers = model.model.layers
            self.masks[ratio] = [layer.self_attn.masked_key_indices for layer in layers]


def presses(k, ratio):
    """Return name -> press: kvpress's as they are, and with our conventions one after the other."""
    plain = {
        "snapkv": kvpress.SnapKVPress(ratio),
        "keydiff": kvpress.KeyDiffPress(ratio),
        "knorm": kvpress.KnormPress(ratio),
        "expected_attention": kvpress.ExpectedAttentionPress(ratio),
        "window": kvpress.StreamingLLMPress(ratio),
        "random": kvpress.RandomPress(ratio, seed=0),
    }
    found = dict(plain)
    for name in ("snapkv", "keydiff", "knorm", "expected_attention"):
        found[f"{name}, one set"] = Changed(plain[name])
        found[f"{name}, one set, forced"] = Changed(plain[name], 0, 4, k // 4)
        found[f"{name}, one set, forced, pool 4"] = Changed(plain[name], 4, 4, k // 4)
    return found


class Reading:
    """Texts read once: the cache, and what each attention layer's hook is given."""

    def __init__(self, model, ids):
        self.ids, self.calls, self.cache = ids, [], DynamicCache()

        def heard(module, args, kwargs, output):
            self.calls.append([module, args, dict(kwargs), output])

        hooks = []
        for layer in model.model.layers:
            layer.self_attn.rotary_emb = model.model.rotary_emb  # as a press does
            layer.self_attn.masked_key_indices = None
            hooks.append(layer.self_attn.register_forward_hook(heard, with_kwargs=True))
        model.model(input_ids=ids, past_key_values=self.cache)
        for hook in hooks:
            hook.remove()

    def add(self, other):
        """Take another's texts, which are as long, as further rows."""
        self.ids = torch.cat([self.ids, other.ids])
        for mine, theirs in zip(self.cache.layers, other.cache.layers):
            mine.keys = torch.cat([mine.keys, theirs.keys])
            mine.values = torch.cat([mine.values, theirs.values])
        for mine, theirs in zip(self.calls, other.calls):
            states = mine[2]["hidden_states"], theirs[2]["hidden_states"]
            mine[2]["hidden_states"] = torch.cat(states)

    def row(self, i):
        """Return the cache of one text."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[i : i + 1], layer.values[i : i + 1]
        return cache

    def pressed(self, model, press):
        """Return a cache as after reading under a press: its hook runs after each layer's attention."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        press.post_init_from_model(model)
        for module, args, kwargs, output in self.calls:
            press.forward_hook(module, args, {**kwargs, "past_key_values": cache}, output)
        return cache

    def kept(self, press, n_kept):
        """Return the positions of the first text that a press keeps, for each layer, in its first head."""
        found = []
        for module, _, kwargs, output in self.calls:
            layer, states = self.cache.layers[module.layer_idx], kwargs["hidden_states"][:1]
            scores = press.score(module, states, layer.keys[:1], layer.values[:1], output[1], kwargs)
            found.append(scores[0, 0].topk(n_kept).indices.sort().values.tolist())
        return found

    def zipped(self, model, i, ratios):
        """Return what KVzip masks in one text, for each ratio a list of layers."""
        press = ManyRatios(compression_ratio=ratios[0])
        press.ratios = ratios
        with press(model):  # reconstructs when the context ends
            press._context_ids, press._cache = self.ids[i : i + 1], self.row(i)
        return press.masks


def check_replay(model, reading, ratio):
    """Hold a replayed press against the press's own context, bit for bit, before texts are added."""
    press, real = kvpress.SnapKVPress(ratio), DynamicCache()
    with press(model):
        model.model(input_ids=reading.ids, past_key_values=real)
    for a, b in zip(reading.pressed(model, press).layers, real.layers):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values), "a replay differs"


def check_logits(model, work):
    """Return the largest difference of the logits from MLX's, in the first tokens and in all."""
    ours = np.load(work / "logits.npz")
    logits = model(input_ids=torch.tensor(ours["ids"].tolist())[None]).logits[0].numpy()[ours["rows"]]
    gaps = np.abs(logits - ours["logits"]).max(axis=1)
    near, worst = float(gaps[ours["rows"] < AGREE_UNTIL].max()), float(gaps.max())
    print(f"logits differ by {near:.1e} in the first {AGREE_UNTIL} tokens, {worst:.1e} in all", flush=True)
    assert near < LOGITS_AGREE, f"logits differ by {near}: this is another model."
    assert (logits.argmax(axis=1) == ours["logits"].argmax(axis=1)).all(), "another token is likeliest."
    return {"first": near, "all": worst, "tokens": len(ours["ids"])}


def texts_of(items):
    """Group items by their document."""
    texts = {}
    for item in items:
        texts.setdefault(tuple(item["document"]), []).append(item)
    return texts


def answers(pipe, items, cache, length):
    """Return the reply to each item's question: greedily, all at once, as `generate_answer` would.

    Args:
        pipe: kvpress's pipeline.
        items (list of dict): with questions of one length, as many a row of the cache.
        cache (DynamicCache): the texts, pressed.
        length (int): tokens of a text: where the question's positions begin.
    """
    model, stop = pipe.model, set(pipe.model.generation_config.eos_token_id)
    repeats = len(items) // cache.layers[0].keys.shape[0]
    for layer in cache.layers:
        layer.keys = layer.keys.repeat_interleave(repeats, dim=0)
        layer.values = layer.values.repeat_interleave(repeats, dim=0)
    ids = torch.tensor([item["question"] for item in items])
    written, running = [[] for _ in items], set(range(len(items)))
    for _ in range(MAX_TOKENS):
        positions = torch.arange(length, length + ids.shape[1])[None]
        out = model(input_ids=ids, past_key_values=cache, position_ids=positions, logits_to_keep=1)
        length += ids.shape[1]
        ids = out.logits[:, -1].argmax(dim=-1)[:, None]
        for row in list(running):
            token = ids[row].item()
            if token in stop:
                running.discard(row)
            else:
                written[row].append(token)
        if not running:
            break
    decode = pipe.tokenizer.decode
    return {item["key"]: decode(ids, skip_special_tokens=True) for item, ids in zip(items, written)}


def check_answers(pipe, item, cache, length):
    """Hold one reply against that of kvpress's own loop."""
    question = torch.tensor(item["question"])[None]
    theirs = pipe.generate_answer(question, copy.deepcopy(cache), length, MAX_TOKENS)
    ours = answers(pipe, [item], cache, length)[item["key"]]
    assert theirs == ours, f"kvpress's loop says {theirs!r}, this one {ours!r}"


def run_kind(pipe, spec, done, write):
    """Answer every text's questions under every press and budget; yield what one-set presses keep.

    Args:
        pipe: kvpress's pipeline.
        spec (dict): what `kvpress_peer.py items` wrote.
        done (set): (name, K, text) that are there already.
        write (callable): takes a record.
    """
    model, texts = pipe.model, texts_of(spec["items"])
    documents, items = list(texts), [item for text in texts.values() for item in text]
    length, per_text = len(documents[0]), len(items) // len(documents)
    # Half an entry more, so that the number kept is K whatever a product rounds to.
    ratios = {k: 1 - (k + 0.5) / length for k in spec["budgets"]}
    k, reading = max(ratios), None
    for i, ids in enumerate(documents):
        one = Reading(model, torch.tensor(ids)[None])
        if reading is None:
            check_replay(model, one, ratios[k])
            check_answers(pipe, items[0], one.pressed(model, kvpress.SnapKVPress(ratios[k])), length)
            reading = one
        else:
            reading.add(one)
        print(f"read {i + 1} of {len(documents)}", flush=True)

    def ask(name, k, cache, text=None):
        asked = items if text is None else items[text * per_text :][:per_text]
        start = time.perf_counter()
        write({"name": name, "k": k, "text": text, "replies": answers(pipe, asked, cache, length)})
        print(f"{name}@{k} {'' if text is None else text}: {time.perf_counter() - start:.0f} s", flush=True)

    found = {k: presses(k, ratio) for k, ratio in ratios.items()}
    yield {f"{n}@{k}": reading.kept(p, k) for k in found for n, p in found[k].items() if n.endswith("one set")}
    for i in range(len(documents)):
        if ("dense", 0, i) not in done:
            ask("dense", 0, reading.row(i), i)
    for name in sorted(found[k], key=lambda name: name.count(",")):  # kvpress's own first
        for k in found:
            if (name, k, None) not in done:
                cache = reading.pressed(model, found[k][name])
                assert {layer.keys.shape[2] for layer in cache.layers} == {k}
                ask(name, k, cache)


def run_kvzip(pipe, spec, done, write):
    """Answer every text's questions under KVzip, which makes its scores by reading on: a text at a time."""
    model, texts = pipe.model, texts_of(spec["items"])
    modules = [layer.self_attn for layer in model.model.layers]
    for i, (ids, items) in enumerate(texts.items()):
        ratios = {k: 1 - k / len(ids) for k in spec["budgets"]}
        if all(("kvzip", k, i) in done for k in ratios):
            continue
        start = time.perf_counter()
        reading = Reading(model, torch.tensor(ids)[None])
        masks = reading.zipped(model, 0, list(ratios.values()))
        for k, ratio in ratios.items():
            # One mask for every question about the text.
            for module, (rows, heads, slots) in zip(modules, masks[ratio]):
                every = torch.arange(len(items)).repeat_interleave(len(rows))
                module.masked_key_indices = every, heads.repeat(len(items)), slots.repeat(len(items))
            replies = answers(pipe, items, reading.row(0), len(ids))
            write({"name": "kvzip", "k": k, "text": i, "replies": replies})
        print(f"kvzip, text {i + 1} of {len(texts)}: {time.perf_counter() - start:.0f} s", flush=True)
    yield {}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="the folder that kvpress_peer.py items wrote")
    parser.add_argument("--model", required=True, help="the folder of the bundled model")
    parser.add_argument("--kind", required=True, help="digits or words")
    parser.add_argument("--kvzip", action="store_true", help="run KVzip, and else all other presses")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    pipe = pipeline("kv-press-text-generation", model=model, tokenizer=tokenizer)
    work = options.work
    spec = json.loads((work / f"items-{options.kind}.json").read_text())
    journal = work / f"theirs-{options.kind}{'-kvzip' if options.kvzip else ''}.jsonl"
    lines = journal.read_text().splitlines() if journal.exists() else []
    records = [json.loads(line) for line in lines]
    done = {(r["name"], r["k"], r["text"]) for r in records if "name" in r}
    with open(journal, "a") as out:

        def write(record):
            out.write(json.dumps(record) + "\n")
            out.flush()

        if not lines:
            names = ("torch", "transformers", "kvpress")
            write({"versions": {n: version(n) for n in names}, "logits": check_logits(model, work)})
        run = run_kvzip if options.kvzip else run_kind
        for kept in filter(None, run(pipe, spec, done, write)):
            (work / f"kept-theirs-{options.kind}.json").write_text(json.dumps(kept))


if __name__ == "__main__":
    main()
