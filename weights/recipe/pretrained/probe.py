"""What pruned caches still know: the loss of replies after the text before them is cut to a budget.

    python probe.py MODEL dev.npz OUT --shares 0.25 0.125

Each row's text before its first question is read densely and pruned by every kind of head, and by
rules to compare with; then the rest is read with what was kept. No question is known at the cut.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
import train as R
from teacher import Teacher

N_SINK, N_RECENT, RADIUS = 4, 64, 4


def keep(scores, budget, pool=True):
    """Return the positions `[budget]` that a prune keeps, ascending: as mlx_dsa.eviction does."""
    if pool:
        scores = F.max_pool1d(scores[None, None].float(), 2 * RADIUS + 1, 1, RADIUS)[0, 0]
    scores = scores.clone()
    scores[:N_SINK] = scores[-N_RECENT:] = torch.inf
    return scores.topk(min(budget, len(scores))).indices.sort().values


def snap(view, lse, window=32):
    """Return SnapKV's score: pooled attention that the last queries pay, over all heads."""
    rows = torch.arange(len(view.x) - window, len(view.x), device=view.x.device)
    return next(p for _, p in R.T.row_probabilities(view, lse[:, rows], rows)).mean((0, 1))


def read_on(teacher, tokens, start, kept):
    """Read the tokens from `start` on over what is kept of those before.

    Args:
        teacher (Teacher): the model.
        tokens (Tensor): all `[L]`.
        start (int): the first to be read.
        kept (list): a layer's (keys, values, positions) of tokens before it.

    Returns:
        tuple: their logits `[L - start, V]`, and `kept` with their own entries.
    """
    h = teacher.embed(tokens[start:])
    places, grown = torch.arange(start, len(tokens), device=tokens.device), []
    for layer in range(teacher.n_layers):
        q, k, v = teacher.project(layer, teacher.normalise(h), places)
        old_k, old_v, at = kept[layer]
        k, v, at = torch.cat([old_k, k], 1), torch.cat([old_v, v], 1), torch.cat([at, places])
        grown.append((k, v, at))
        mask = at[None] <= places[:, None]
        groups = len(q) // len(k)
        out = F.scaled_dot_product_attention(
            q[None], k.repeat_interleave(groups, 0)[None], v.repeat_interleave(groups, 0)[None], mask
        )[0]
        h = teacher.finish(layer, h, out)
    return teacher.logits(h), grown


def probe(teacher, rows, out, shares, device):
    """Yield a dict for each row: loss and greedy agreement with dense of each way to prune."""
    names = sorted(p.stem.removeprefix("heads-") for p in Path(out).glob("heads-*.safetensors"))
    heads = {n: load_file(str(Path(out) / f"heads-{n}.safetensors")) for n in names}
    heads = {n: {k: v.float().to(device) for k, v in h.items()} for n, h in heads.items()}
    for i in range(len(rows)):
        tokens, focus, _, kind = rows.row(i, device)
        if kind == "twice" or len(focus) > len(tokens) // 2 or focus[0] < 2048:
            continue
        start = int(focus[0])
        views = [(v.keys, v.values, _scores(heads, n, v, lse)) for n, v, lse, _ in teacher.views(tokens[:start])]
        tail = focus[focus < len(tokens) - 1] - start
        labels = tokens[start:][tail + 1]
        everything = torch.arange(start, device=device)
        whole = [(k, v, everything) for k, v, _ in views]
        dense = read_on(teacher, tokens, start, whole)[0][tail]
        best, result = dense.argmax(-1), {"kind": kind, "length": len(tokens)}
        right = best == labels
        result["dense", 1.0] = F.cross_entropy(dense, labels).item(), 1.0
        for share in shares:
            for name in [*names, *(f"{n}+keydiff" for n in names), "snap", "keydiff", "window"]:
                kept = []
                for k, v, scores in views:
                    at = keep(scores[name], int(start * share), name != "window")
                    kept.append((k[:, at], v[:, at], at))
                logits = read_on(teacher, tokens, start, kept)[0][tail]
                agree = (logits.argmax(-1) == best)[right].float().mean().item()
                result[name, share] = F.cross_entropy(logits, labels).item(), agree
        yield result


def _scores(heads, layer, view, lse):
    scores = {}
    for name, h in heads.items():
        at = lambda k, h=h: h[f"layers.{layer}.retention.{k}"]  # noqa: E731
        inner = F.gelu(F.linear(view.x, at("up.weight"), at("up.bias")), approximate="tanh")
        scores[name] = F.linear(inner, at("down.weight"), at("down.bias"))[:, 0]
    unit = F.normalize(view.keys.float(), dim=-1)
    mean = F.normalize(unit.mean(1, keepdim=True), dim=-1)
    scores["keydiff"] = -(unit * mean).sum(-1).mean(0)
    scores |= {f"{n}+keydiff": _standard(scores[n]) + _standard(scores["keydiff"]) for n in heads}
    scores["snap"] = snap(view, lse)
    scores["window"] = torch.arange(len(view.x), device=view.x.device).float()
    return scores


def _standard(scores):
    return (scores - scores.mean()) / scores.std()


def main():
    """Print, by length and kind, the loss over dense and the share of dense's right tokens kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("dev")
    parser.add_argument("out")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.125])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    device = "cpu" if args.cpu else "cuda"
    teacher = Teacher(args.model, device, torch.float32 if args.cpu else torch.bfloat16, args.layers)
    cells = {}
    with torch.no_grad():
        for found in probe(teacher, R.Rows(args.dev), args.out, args.shares, device):
            dense = found["dense", 1.0][0]
            for way, (loss, agree) in ((k, v) for k, v in found.items() if isinstance(k, tuple)):
                for cell in ((found["length"] // 1024, "all"), (found["length"] // 1024, found["kind"])):
                    cells.setdefault((*cell, *way), []).append((loss - dense, agree))
    for cell, values in sorted(cells.items(), key=str):
        more, agree = np.nanmean(values, axis=0)
        print("{}K {} {} {}:".format(*cell), f"n {len(values)} loss +{more:.4f} agreement {agree:.4f}", flush=True)


if __name__ == "__main__":
    main()
