"""Train the reference model on one or more GPUs of one machine (or, for a rehearsal, on the CPU).

    python weights/recipe/train.py --data .gpu --tok weights/tiny --out $OUT --seconds 450

The length of training is a time: the learning rate and the row lengths follow the share of
`--seconds` that has passed. Writes OUT/model.safetensors (float16, HF names) every few minutes and
at the end, and OUT/log.jsonl.
"""

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parent))
import evaluate
import rows as R
from corpus import Corpus
from model import CONFIG, Model, hf_name
from optim import Optimizer

from mlx_dsa.tasks import problems as P
from mlx_dsa.tasks import wordlists as w


def problem_text(rng):
    problem = P.make_problem(rng)
    return f"{problem.question}\n{problem.answer}"


def load_corpus(args, name):
    books = np.fromfile(args.data / f"{name}.bin", dtype=np.uint16)
    numbers = np.fromfile(args.data / "gsm8k-train.bin", dtype=np.uint16)
    return Corpus(args.tok / "tokenizer.json", books, numbers, problem_text)


class Batches(torch.utils.data.IterableDataset):
    """Endless (tokens, weights, row length), composed in worker processes; each has its own seed."""

    def __init__(self, args, rank, progress):
        self.args, self.rank, self.progress = args, rank, progress
        self.corpus = load_corpus(args, "books-train")
        pools = json.loads((args.data / "words.json").read_text())
        # The built-in words keep a share of the values.
        own = w.PARTS["train"]["words"]
        pools["words"] += own * (len(pools["words"]) // (8 * len(own)))
        self.rows = R.Rows(self.corpus, pools=pools)

    def __iter__(self):
        torch.set_num_threads(1)
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self.args.seed}-{self.rank}-{worker.id if worker else 0}-{self.args.start}")
        while True:
            length = R.row_length(rng, self.args.phases, self.progress.value)
            length = min(length, self.args.longest)
            tokens, weights = self.rows.batch(rng, length, self.args.size)
            yield torch.from_numpy(tokens.astype(np.int32)), torch.from_numpy(weights), length


def learning_rate(t, step, hold):
    """Warm up over 100 steps, hold until the share `hold` of the time, then fall to zero in a line."""
    return min(1.0, (step + 1) / 100) * min(1.0, max(0.0, (1 - t) / (1 - hold)))


def save(model, path):
    """Write the weights in float16 under their HF names."""
    from safetensors.torch import save_file

    weights = {hf_name(n): p.detach().half().cpu().contiguous() for n, p in model.named_parameters()}
    save_file(weights, str(path) + ".part", metadata={"format": "pt"})
    os.replace(str(path) + ".part", path)


def resume(model, path):
    from safetensors.torch import load_file

    weights = load_file(str(path))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[hf_name(name)])


def worker(rank, world, args):
    gpu = torch.cuda.is_available()
    progress = mp.Value("d", args.start)
    loader = torch.utils.data.DataLoader(
        Batches(args, rank, progress), batch_size=None, num_workers=args.workers, pin_memory=gpu,
        prefetch_factor=3 if args.workers else None, multiprocessing_context="fork" if args.workers else None,
    )  # fmt: skip
    batches = iter(loader)
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if gpu else "gloo", f"tcp://127.0.0.1:{args.port}", rank=rank, world_size=world)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    model = Model(CONFIG, compiled=not args.eager).to(device)
    if not gpu:
        model.dtype = torch.float32
    if args.resume:
        resume(model, args.resume)
    optimizer = Optimizer(model, compiled=not args.eager)
    suite = evaluate.Suite(args, load_corpus(args, "books-heldout"), rank, world)
    log = open(args.out / "log.jsonl", "a") if rank == 0 else None

    def tell(**item):
        if rank == 0:
            line = json.dumps(item)
            print(line, flush=True)
            log.write(line + "\n")
            log.flush()

    def compute(step, t, scale):
        optimizer.zero()
        total = 0.0
        for _ in range(args.micro):
            tokens, weights, length = next(batches)
            tokens = tokens.to(device, non_blocking=True)
            weights = weights.to(device, non_blocking=True)[:, 1:].reshape(-1).float() / 4
            inputs, targets = tokens[:, :-1].reshape(-1), tokens[:, 1:].reshape(-1).long()
            loss = (model(inputs, targets, length) * weights).sum() / inputs.numel()
            (loss / args.micro).backward()
            total = total + loss.detach() / args.micro
        if world > 1:
            dist.all_reduce(optimizer.flat, op=dist.ReduceOp.SUM)
            optimizer.flat.div_(world)
        if not args.eval_only:
            optimizer.step(scale, step)
        return total

    # The clock starts after compilation, so that the schedule is not spent on it.
    began = time.time()
    compute(0, 0.0, 0.0)
    if gpu:
        torch.cuda.synchronize()
    tell(compile_seconds=round(time.time() - began, 1), world=world, torch=torch.__version__)
    clock = torch.zeros(1, device=device, dtype=torch.float64)
    start, t, rate, step, synced = time.time(), args.start, 0.0, 0, 0
    t_sync, loss = t, 0.0
    next_eval = args.start + args.eval_every
    span = 1 - args.start
    per_step = args.size * args.micro * world
    while not args.eval_only:
        if step % args.sync == 0:  # both ranks take the share of time from rank 0
            clock.fill_(args.start + span * (time.time() - start) / args.seconds)
            if world > 1:
                dist.broadcast(clock, 0)
            now = clock.item()
            rate = (now - t_sync) / (step - synced) if step else 0.0
            t = t_sync = now
            synced = step
            progress.value = t
            if step % (args.sync * 10) == 0 and step:
                tell(
                    step=step,
                    t=round(t, 4),
                    loss=round(float(loss), 4),
                    tokens=step * per_step,
                    seconds=round(time.time() - start, 1),
                    rate=round(span / args.seconds / max(rate, 1e-12) * per_step),
                )
            if t >= 1 or (args.steps and step >= args.steps):
                break
            if t >= next_eval and t < 0.97:
                next_eval += args.eval_every
                tell(step=step, t=round(t, 4), quick=suite.run(model, device, quick=True))
                if rank == 0:
                    save(model, args.out / "model.safetensors")
        loss = compute(step, t, args.peak * learning_rate(min(t, 1.0), step, args.hold))
        step += 1
        t += rate
    if rank == 0:
        save(model, args.out / "model.safetensors")
    tell(step=step, tokens=step * per_step, seconds=round(time.time() - start, 1), done=True)
    tell(final=suite.run(model, device, quick=False))
    if world > 1:
        dist.barrier()
    os._exit(0)  # the workers' queues are full: nothing to wait for


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tok", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=450, help="training time after compilation")
    parser.add_argument("--steps", type=int, default=0, help="stop after so many steps (a rehearsal)")
    parser.add_argument("--size", type=int, default=73728, help="tokens a micro-batch and GPU")
    parser.add_argument("--micro", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--world", type=int, default=0, help="processes; default: one a GPU")
    parser.add_argument("--workers", type=int, default=13, help="processes that compose rows, each rank")
    parser.add_argument("--longest", type=int, default=18432)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=float, default=0.0, help="share of the schedule to begin at")
    parser.add_argument("--phases", choices=list(R.PHASES), default="first")
    parser.add_argument("--peak", type=float, default=1.0, help="factor of both learning rates")
    parser.add_argument("--hold", type=float, default=0.2, help="share of the time before they fall")
    parser.add_argument("--resume", type=Path, help="model.safetensors to begin from")
    parser.add_argument("--eval-every", type=float, default=0.1)
    parser.add_argument("--eval-only", action="store_true")
    parser.add_argument("--cases", type=int, default=256, help="cases a cell in the last evaluation")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--sync", type=int, default=20)
    parser.add_argument("--port", type=int, default=29517)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    world = args.world or max(1, torch.cuda.device_count())
    if world == 1:
        worker(0, 1, args)
    else:
        mp.spawn(worker, args=(world, args), nprocs=world)


if __name__ == "__main__":
    main()
