"""Agreement with kvpress 0.5.5 (PyTorch) on the bundled model and the very items of `mlx-dsa eval needle`.

kvpress wants a virtual environment of its own (`pip install kvpress==0.5.5` and torch), PEER below:

    python eval/kvpress_peer.py items WORK
    PEER/bin/python eval/kvpress_theirs.py WORK --model weights/tiny --kind digits
    python eval/kvpress_peer.py ours WORK
    python eval/kvpress_report.py WORK eval/results/kvpress

The second for --kind words too; second and third again with --kvzip. Each goes on where it was stopped. A text of
4,096 tokens is read, pressed to K entries, then asked for four facts, each in a conversation of its own.
"""

import argparse
import json
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import mlx_dsa  # noqa: F401  (before MLX: it says which BLAS that uses)

# isort: split
import mlx.core as mx
import numpy as np

from mlx_dsa.config import SparseConfig
from mlx_dsa.evals.needles import needle
from mlx_dsa.evals.policies import DENSE, Policy, make_policy
from mlx_dsa.evals.subject import fingerprint
from mlx_dsa.presets import load_preset
from mlx_dsa.registry import rule_names
from mlx_dsa.tasks.haystack import read_haystack
from mlx_dsa.tasks.needle_items import NeedleSpec, make_items

KINDS = {"digits": "digits", "words": "word"}
BUDGETS = (128, 256, 512)
LENGTH, DEPTHS, SEED = 4096, (0.1, 0.3, 0.5, 0.7, 0.9), 1
# Rules that kvpress has too, and their names there.
SHARED = ("snapkv", "keydiff", "knorm", "expected_attention", "kvzip", "window", "random")
# Entries on top of K for a question and its answer, where they don't count in.
ROOM = 160
MAX_TOKENS = 32


@dataclass(frozen=True)
class OnTop(Policy):
    """A policy that keeps K entries of the text, and question and answer beside them, as kvpress does."""

    keep: int = 0
    kept_file: str | None = None

    @property
    def top_k(self):
        return self.keep

    @contextmanager
    def apply(self, subject, marks=None, **options):
        with super().apply(subject, marks, **options) as patch:
            prune = patch.end_prompts

            def end_prompts(caches):
                if caches[0].size() > self.config.top_k:  # the text's end
                    for cache in caches:
                        cache.budget = self.keep
                    prune(caches)
                    self._note(caches)
                    for cache in caches:
                        cache.budget = self.config.top_k

            patch.end_prompts = end_prompts
            yield patch

    def _note(self, caches):
        """Write down which positions of the first text are kept, once."""
        if self.kept_file is None:
            return
        path = Path(self.kept_file)
        found = json.loads(path.read_text()) if path.exists() else {}
        if self.label not in found:
            found[self.label] = [sorted(c.positions[0].tolist()) for c in caches]
            path.write_text(json.dumps(found))


def ours_policies(kind, work, evict_names):
    """Return the policies of our side: as they are, without pooling, and as near to kvpress's as they go."""
    policies, kept_file = [DENSE], str(work / f"kept-ours-{kind}.json")
    for k in BUDGETS:
        base = {"top_k": k, "n_sink": 4, "n_recent": k // 4, "prefill": "dense"}

        def add(label, evict, **more):
            policies.append(Policy(f"{label}@{k}", SparseConfig(**{**base, "evict": evict, **more})))

        def add_near(name, evict, **more):
            config = SparseConfig(**{**base, "evict": evict, "n_recent": 1, **more, "top_k": k + ROOM})
            policies.append(OnTop(f"{name}, near@{k}", config, keep=k, kept_file=kept_file))

        for name in (*SHARED, "retention"):
            if name in evict_names:
                select = {"select": name} if name in ("window", "random") else {}
                add(name, name, **select)
        for name in ("snapkv", "keydiff"):
            add(f"{name}, pool 0", f"{name}:pool=0")
        add_near("snapkv", "snapkv:pool=2", n_sink=0, n_recent=64, observation_window=64)
        for name, evict in (("keydiff", "keydiff:pool=0"), ("knorm", "knorm:pool=0"), ("retention",) * 2):
            add_near(name, evict, n_sink=0)
        if "expected_attention" in evict_names:
            add_near("expected_attention", "expected_attention:queries=4096")
    return policies


def kvzip_policies():
    """Return the policies of KVzip, which an evaluation has and no setting names."""
    policies = []
    for k in BUDGETS:
        base = SparseConfig(top_k=k, n_sink=4, n_recent=k // 4, prefill="dense")
        own = make_policy("kvzip", base)
        config = replace(own.config, top_k=k + ROOM, n_recent=1)
        policies += [own, OnTop(f"kvzip, near@{k}", config, own.scorer, keep=k)]
    return policies


def _read_once(read_again):
    """Return KVzip's second reading with what it said of a text kept for the other policies."""
    said = {}

    def read(model, layers, caches, ids, *args):
        key = fingerprint(ids.tolist())
        if key not in said:
            read_again(model, layers, caches, ids, *args)
            said[key] = {i: caches[i].worth for i in layers}
        for i in layers:
            caches[i].worth = said[key][i]

    return read


def settings(kind):
    """Return what `needle` takes to make the items."""
    return {"setting": "before-question", "per_document": 4, "value": KINDS[kind], "seed": SEED, "even": True}


def items_of(subject, kind, texts):
    """Return our evaluator's own items, four a text."""
    prose = read_haystack(None, subject.tokenizer, False, SEED)
    return make_items(NeedleSpec(**settings(kind)), prose, subject.tokenizer, [LENGTH], DEPTHS, texts)


def write_items(work, texts):
    """Write the items, and logits of a text for the other side to check the model by."""
    subject = load_preset("tiny")
    subject.model.set_dtype(mx.float32)
    work.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        items = []
        for item in items_of(subject, kind, texts):
            document, question = item.turns
            items.append(
                {
                    "key": item.key,
                    "hash": fingerprint([turn.ids for turn in item.turns]),
                    "document": document.ids,
                    "question": question.ids,
                    "values": question.values,
                    "others": question.others,
                }
            )
        (work / f"items-{kind}.json").write_text(json.dumps({"budgets": BUDGETS, "items": items}))
        print(f"{kind}: {len(items)} items, {len(items[0]['document'])} tokens")
    ids = np.array(items[0]["document"][:2048])
    rows = np.arange(0, len(ids), 16)
    logits = subject.model(mx.array(ids)[None])[0][mx.array(rows)]
    np.savez(work / "logits.npz", ids=ids, rows=rows, logits=np.array(logits))


def run_ours(work, texts, kinds, zips):
    """Run our side, or its KVzip; the journals of `needle` let it go on."""
    if zips:
        from mlx_dsa.rules import kvzip

        kvzip.read_again = _read_once(kvzip.read_again)
    subject = load_preset("tiny")
    subject.model.set_dtype(mx.float32)
    for kind in kinds:
        needle(
            subject,
            kvzip_policies() if zips else ours_policies(kind, work, rule_names("evict")),
            lengths=[LENGTH],
            depths=DEPTHS,
            limit=texts,
            batch_size=1 if zips else len(DEPTHS) * texts,  # a second reading takes memory
            max_tokens=MAX_TOKENS,
            name="tiny",
            out=work / f"ours-{kind}{'-kvzip' if zips else ''}.json",
            progress=lambda done, of, key: print(f"{kind}: {done} of {of}, {key}", flush=True),
            **settings(kind),
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("step", choices=("items", "ours"))
    parser.add_argument("work", type=Path, help="a folder for what is passed between the steps")
    parser.add_argument("--texts", type=int, default=2, help="texts a depth, four items each (default: 2)")
    parser.add_argument("--kind", action="append", choices=tuple(KINDS), help="default: both")
    parser.add_argument("--kvzip", action="store_true", help="run KVzip, and else all other rules")
    options = parser.parse_args()
    if options.step == "items":
        write_items(options.work, options.texts)
    else:
        run_ours(options.work, options.texts, options.kind or list(KINDS), options.kvzip)


if __name__ == "__main__":
    main()
