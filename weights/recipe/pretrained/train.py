"""Train the indexers and retention heads of a pretrained model on one or more GPUs, with PyTorch.

    torchrun --nproc-per-node 12 train.py MODEL rows.npz OUT --seconds 300 [--dev dev.npz]

Several processes share a GPU: one alone can't launch the many small operations as fast as they run.

What is learnt is what `mlx-dsa train` learns (tests/test_recipe_losses.py); one pass of the frozen
model serves the indexers and several kinds of heads, of which probe.py compares what they keep.
The schedule follows the clock.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent))
import heads as H
import targets as T
from safetensors.torch import save_file
from teacher import Teacher
from torch import nn

MIN_DISTANCE, N_SINK, N_RECENT, FEWEST = 32, 4, 32, 256
# Kinds of heads: what is learnt of the largest attention, and whose attention counts.
KINDS = [("odds", "asked"), ("log", "asked"), ("log", "value"), ("log", "output"), ("log", "effect")]


class Rows:
    """The rows of a file that prepare.py wrote, and whom each GPU takes next."""

    def __init__(self, path):
        data = np.load(path)
        self.tokens, self.focus = data["tokens"], data["focus"]
        self.offsets, self.n_keys = data["offsets"], data["n_keys"]
        self.kinds, self.lengths = data["kind"], data["length"]

    def __len__(self):
        return len(self.n_keys)

    def row(self, i, device):
        """Return tokens, focus positions (tensors), learnt keys and kind of a row."""
        part = slice(self.offsets[i], self.offsets[i + 1])
        tokens = torch.from_numpy(self.tokens[part].astype(np.int64)).to(device)
        focus = torch.from_numpy(np.nonzero(self.focus[part])[0]).to(device)
        return tokens, focus, int(self.n_keys[i]), str(self.kinds[i])

    def batches(self, size, world, seed):
        """Yield for ever a list of rows for each GPU, together of `size` tokens each, of one length."""
        for epoch in range(10**6):
            rng = np.random.default_rng([seed, epoch])
            made = []
            for length in np.unique(self.lengths):
                of_length = rng.permutation(np.nonzero(self.lengths == length)[0])
                each = max(1, size // int(length))
                for start in range(0, len(of_length) - each * world + 1, each * world):
                    part = of_length[start : start + each * world]
                    made.append([part[r::world] for r in range(world)])
            for i in rng.permutation(len(made)):
                yield epoch, made[i]


class Layer(nn.Module):
    """What is trained beside one attention layer; `spread` is of the hidden state's channels."""

    def __init__(self, dim, theta, shape):
        super().__init__()
        self.indexer = H.Indexer(dim, *shape, theta=theta)
        self.heads = H.RetentionHeads(dim, len(KINDS))
        self.register_buffer("spread", torch.ones(dim))


def sample_rows(length, focus, count, rng):
    """Draw query rows that see more than FEWEST keys, half of them of the focus positions."""
    focus = focus[focus >= FEWEST]
    n_focus = count // 2 if len(focus) else 0
    drawn = [torch.from_numpy(rng.integers(FEWEST, length, count - n_focus)).to(focus.device)]
    if n_focus:
        drawn.append(focus[torch.from_numpy(rng.integers(0, len(focus), n_focus)).to(focus.device)])
    return torch.cat(drawn).sort().values


def retention_targets(teacher, layer, view, lse, residual, focus, n_keys, kind):
    """Return the targets `[kinds, L]` of the heads, and how many first keys they count for.

    The largest attention that is paid to a key; or that by the norm of the key's value, by the norm
    of what the head makes of the value in the output (`output`), or by the latter over the norm of
    the residual stream that it is added to (`effect`), as in KVzip+; each over its mean.
    """
    length = len(view.x)
    if kind == "twice":
        rows = torch.arange(n_keys, length, device=view.x.device)
    elif len(focus) < length // 2:
        rows = focus
    else:  # running text
        rows, n_keys = torch.arange(MIN_DISTANCE + 1, length, device=view.x.device), length * 3 // 4
    lse = lse[:, rows]
    groups = len(view.queries) // len(view.keys)
    values = view.values.float()
    values_norm = values.norm(dim=-1)
    values_norm = (values_norm / values_norm.mean()).repeat_interleave(groups, dim=0).contiguous()
    output_norm = teacher.output_norms(layer, values)
    output_norm = (output_norm / output_norm.mean()).contiguous()
    size = residual.norm(dim=-1)[rows]
    weights = {"asked": (lse, None), "value": (lse, values_norm), "output": (lse, output_norm)}
    weights["effect"] = (lse + (size / size.mean()).log(), output_norm)
    by_name = {k: T.future_attention(view, a, rows, MIN_DISTANCE, w) for k, (a, w) in weights.items()}
    return [by_name[of] for _, of in KINDS], n_keys


def calibrate(teacher, layers, rows, device):
    """Set each layer's spread from some rows; first tokens, whose states are huge, don't count."""
    sums = [0.0] * len(layers)
    for i in range(0, len(rows), max(1, len(rows) // 4)):
        tokens = rows.row(i, device)[0][:8192]
        for n, view, _, _ in teacher.views(tokens):
            sums[n] = sums[n] + view.x[8:].pow(2).mean(0)
    for layer, total in zip(layers, sums):
        layer.spread.copy_((total / total.mean()).sqrt().clamp_min(0.05))


def learn(teacher, layers, row, count, rng, share):
    """Add the gradients of one row; return the mean losses `[1 + kinds]` of the layers."""
    tokens, focus, n_keys, kind = row
    rows = sample_rows(len(tokens), focus, count, rng)
    losses = 0
    with torch.no_grad():
        for n, view, lse, residual in teacher.views(tokens):
            layer = layers[n]
            target = T.attention_target(view, lse, rows)
            wanted, keys = retention_targets(teacher, n, view, lse, residual, focus, n_keys, kind)
            with torch.enable_grad():
                x = view.x / layer.spread
                is_open = H.open_keys(rows, len(tokens), N_SINK, N_RECENT)
                parts = [H.distillation_loss(layer.indexer(x, rows), target, is_open)]
                scores = layer.heads(x)
                for score, wish, (loss, _) in zip(scores, wanted, KINDS):
                    parts.append(H.retention_loss(score[N_SINK:keys], wish[N_SINK:keys], loss))
                parts = torch.stack(parts)
                (parts.sum() * share).backward()
            losses = losses + parts.detach() / len(layers)
    return losses


def evaluate(teacher, layers, rows, device, top_ks=(256, 512, 1024, 2048)):
    """Return held-out figures a row: losses, mass by top_k over the oracle's by layer, agreement."""
    figures = []
    rng = np.random.default_rng(7)
    with torch.no_grad():
        for i in range(len(rows)):
            tokens, focus, n_keys, kind = rows.row(i, device)
            queries = sample_rows(len(tokens), focus, 512, rng)
            one = {"kind": kind, "length": len(tokens), "kl": [], "mass": {}, "agree": []}
            for n, view, lse, residual in teacher.views(tokens):
                layer, x = layers[n], view.x / layers[n].spread
                target = T.attention_target(view, lse, queries)
                is_open = H.open_keys(queries, len(tokens), N_SINK, N_RECENT)
                scores = layer.indexer(x, queries)
                one["kl"].append(H.distillation_loss(scores, target, is_open).item())
                for k in top_ks:
                    if k < len(tokens) // 2:
                        far = queries >= k
                        got, best = H.mass_shares(scores[far], target[far], is_open[far], queries[far], k)
                        one["mass"].setdefault(k, []).append((got / best).item())
                wanted, keys = retention_targets(teacher, n, view, lse, residual, focus, n_keys, kind)
                best = wanted[0][:keys].topk(keys // 8).indices
                agree = []
                for score in layer.heads(x)[:, :keys]:
                    mine = torch.zeros(keys, device=device)
                    mine[score.topk(keys // 8).indices] = 1
                    agree.append(mine[best].mean().item())
                one["agree"].append(agree)
            figures.append(one)
    return figures


def summary(figures):
    """Return lines that say what `evaluate` found, by length."""
    lines = []
    for length in sorted({f["length"] // 1024 for f in figures}):
        of = [f for f in figures if f["length"] // 1024 == length]
        mass = {k: np.mean([f["mass"][k] for f in of], axis=0) for k in of[0]["mass"]}
        agree = np.mean([np.mean(f["agree"], axis=0) for f in of], axis=0)
        told = ", ".join(f"{k}: {v.mean():.4f} (worst {v.min():.4f} of layer {v.argmin()})" for k, v in mass.items())
        lines.append(f"{length}K kl {np.mean([f['kl'] for f in of]):.4f} mass/oracle {told}")
        named = ", ".join(f"{a}-{b} {v:.3f}" for (a, b), v in zip(KINDS, agree))
        lines.append(f"{length}K agreement at 1/8: {named}")
    return lines


def train(args):
    """Train as the command line says."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    gpus = 0 if args.cpu else torch.cuda.device_count()
    device = "cpu" if args.cpu else f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % gpus}"
    if not args.cpu:
        torch.cuda.set_device(device)
    # NCCL wants a GPU for each process.
    shared = world > gpus
    if world > 1:
        dist.init_process_group("gloo" if shared else "nccl")
    torch.backends.cuda.matmul.allow_tf32 = True
    dtype = torch.float32 if args.cpu else torch.bfloat16
    teacher = Teacher(args.model, device, dtype, args.layers)
    rows = Rows(args.rows)
    torch.manual_seed(args.seed)
    layers = [Layer(teacher.dim, teacher.theta, args.shape).to(device) for _ in range(teacher.n_layers)]
    with torch.no_grad():
        calibrate(teacher, layers, rows, device)
    parameters = [p for layer in layers for p in layer.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=args.rate, weight_decay=0.0, fused=not args.cpu)
    rng = np.random.default_rng([args.seed, 1, rank])
    step, seen, began, told, mean = 0, 0, time.time(), time.time(), None
    for epoch, batch in rows.batches(args.batch, world, args.seed):
        spent = torch.tensor([(time.time() - began) / args.seconds], device="cpu" if shared else device)
        if world > 1:
            dist.broadcast(spent, 0)
        done = max(spent.item(), step / args.steps if args.steps else 0)
        if done >= 1:
            break
        rate = H.learning_rate(int(done * 10000), 10000, args.rate, 300)
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad(set_to_none=False)
        mine = batch[rank]
        for i in mine:
            row = rows.row(i, device)
            losses = learn(teacher, layers, row, args.queries, rng, 1 / len(mine))
            seen += len(row[0]) * world
            mean = losses if mean is None else 0.98 * mean + 0.02 * losses
        if world > 1:
            flat = torch.cat([p.grad.view(-1) for p in parameters]).div_(world)
            total = flat.cpu() if shared else flat
            dist.all_reduce(total)
            for p, g in zip(parameters, total.to(device).split([p.numel() for p in parameters])):
                p.grad.copy_(g.view_as(p))
        for layer in layers:
            nn.utils.clip_grad_norm_(layer.indexer.parameters(), 1.0)
            nn.utils.clip_grad_norm_(layer.heads.parameters(), 1.0)
        optimiser.step()
        step += 1
        if rank == 0 and time.time() - told > args.tell:
            told = time.time()
            peak = 0 if args.cpu else torch.cuda.max_memory_allocated() / 1e9
            figures = " ".join(f"{v:.4f}" for v in mean.tolist())
            print(f"step {step} epoch {epoch} {told - began:.0f} s {seen / 1e6:.1f}M tokens "
                  f"{seen / (told - began) / 1e3:.0f}K/s {peak:.1f} GB rate {rate:.1e} losses {figures}", flush=True)  # fmt: skip
    if rank == 0:
        print(f"end: {step} steps, {seen:,} tokens, {time.time() - began:.0f} s", flush=True)
        save(args, teacher, layers, step, seen, time.time() - began)
        if args.dev:
            for line in summary(evaluate(teacher, layers, Rows(args.dev), device)):
                print(line, flush=True)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def save(args, teacher, layers, step, seen, seconds):
    """Write indexers and heads, in float16, each against the unweighted state."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    indexers, kinds = {}, {f"{a}-{b}": {} for a, b in KINDS}
    for n, layer in enumerate(layers):
        name, at = f"layers.{n}.", lambda w, layer=layer: (w / layer.spread).detach().half().cpu().contiguous()
        for key in ("wq", "wk", "weights_proj"):
            indexers[f"{name}{key}.weight"] = at(layer.indexer.get_submodule(key).weight)
        for key in ("wq", "wk"):
            indexers[f"{name}{key}.bias"] = layer.indexer.get_submodule(key).bias.detach().half().cpu()
        hidden = layer.heads.down.shape[1]
        for k, kind in enumerate(kinds):
            part = slice(k * hidden, (k + 1) * hidden)
            kinds[kind][f"{name}retention.up.weight"] = at(layer.heads.up.weight[part])
            kinds[kind][f"{name}retention.up.bias"] = layer.heads.up.bias[part].detach().half().cpu()
            kinds[kind][f"{name}retention.down.weight"] = layer.heads.down[k : k + 1].detach().half().cpu()
            kinds[kind][f"{name}retention.down.bias"] = layer.heads.bias[k : k + 1].detach().half().cpu()
    save_file(indexers, out / "indexers.safetensors")
    for kind, tensors in kinds.items():
        save_file({k: v.contiguous() for k, v in tensors.items()}, out / f"heads-{kind}.safetensors")
    told = {k: v for k, v in vars(args).items() if k not in ("model", "rows", "out", "dev", "tell", "cpu", "layers")}
    told |= {"steps": step, "tokens": seen, "seconds": round(seconds, 1), "world": int(os.environ.get("WORLD_SIZE", 1))}
    told["device"] = torch.cuda.get_device_name() if not args.cpu else "cpu"
    told["torch"] = torch.__version__
    (out / "run.json").write_text(json.dumps(told, indent=1))


def arguments():
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("out")
    parser.add_argument("--dev")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--steps", type=int, default=0, help="stop there if it is sooner")
    parser.add_argument("--batch", type=int, default=16384, help="tokens a step and GPU")
    parser.add_argument("--queries", type=int, default=768, help="query rows of a text")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--shape", type=int, nargs=3, default=(4, 64, 32), help="index heads, their width, RoPE dims")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tell", type=float, default=15)
    parser.add_argument("--cpu", action="store_true")
    return parser


if __name__ == "__main__":
    train(arguments().parse_args())
