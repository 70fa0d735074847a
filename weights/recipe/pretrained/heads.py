"""Indexers and retention heads of all layers in PyTorch, and what they lose: as in mlx_dsa.train.

They read the hidden state without its norm's weight, each channel divided by its spread, which the
export folds into their matrices.
"""

import math

import torch
import torch.nn.functional as F
from teacher import rotate
from torch import nn

UNSEEN = -1e30
FLOOR = 1e-4  # of attention, where heads learn its logarithm


class Indexer(nn.Module):
    """The lightning indexer of one layer; shapes as in mlx_dsa.indexer.

    Args:
        dim (int): width of the hidden state.
        n_heads, head_dim, rope_dim (int): index heads, their width, and how much of it RoPE turns.
        theta (float): RoPE's base.
    """

    def __init__(self, dim, n_heads=4, head_dim=64, rope_dim=32, theta=1e6):
        super().__init__()
        self.shape = n_heads, head_dim, rope_dim, theta
        self.wq = nn.Linear(dim, n_heads * head_dim)
        self.wk = nn.Linear(dim, head_dim)
        self.weights_proj = nn.Linear(dim, n_heads, bias=False)

    def forward(self, x, rows):
        """Return scores `[R, L]` of the queries at `rows` over the keys of `x` `[L, dim]`, unmasked."""
        n_heads, head_dim, rope_dim, theta = self.shape
        positions = torch.arange(len(x), device=x.device)
        keys = rotate(self.wk(x), positions, theta, rope_dim)
        own = x[rows]
        queries = self.wq(own).view(len(rows), n_heads, head_dim).transpose(0, 1)
        queries = rotate(queries, rows, theta, rope_dim)
        weights = self.weights_proj(own) * (n_heads * head_dim) ** -0.5
        scores = (queries @ keys.T).relu_()
        return (scores * weights.T[..., None]).sum(0)


class RetentionHeads(nn.Module):
    """Retention heads of one layer, several as one product: an MLP of one hidden layer each.

    Args:
        dim (int): width of the hidden state.
        kinds, hidden (int): how many, and their width.
    """

    def __init__(self, dim, kinds, hidden=64):
        super().__init__()
        self.up = nn.Linear(dim, kinds * hidden)
        self.down = nn.Parameter(torch.randn(kinds, hidden) * hidden**-0.5)
        self.bias = nn.Parameter(torch.full((kinds,), -4.0))

    def forward(self, x):
        """Return scores `[kinds, L]`: log-odds, or the logarithm, of the largest later attention."""
        inner = F.gelu(self.up(x), approximate="tanh").view(len(x), *self.down.shape)
        return (inner * self.down).sum(-1).T + self.bias[:, None]


def open_keys(rows, length, n_sink, n_recent):
    """Return which keys `[R, L]` a query has to choose among: seen, and not selected anyway."""
    keys = torch.arange(length, device=rows.device)
    return (keys >= n_sink) & (keys <= rows[:, None] - n_recent)


def distillation_loss(scores, target, is_open):
    """Return the mean over rows of their open keys' part of KL(target || softmax(scores))."""
    scores = scores.masked_fill(~is_open, UNSEEN)
    target = target.masked_fill(~is_open, 0)
    mass = target.sum(-1)
    total = scores.logsumexp(-1)
    loss = torch.xlogy(target, target).sum(-1) - torch.xlogy(mass, mass)
    return (loss + mass * total - (target * scores).sum(-1)).mean()


def retention_loss(scores, target, kind):
    """Return the mean over keys `[L]` of the cross-entropy, or of the squared error of the logarithm."""
    if kind == "odds":
        return (F.softplus(scores) - target * scores).mean()
    return (scores - target.clamp_min(FLOOR).log()).pow(2).mean()


def mass_shares(scores, target, is_open, rows, top_k):
    """Return the attention that the top_k of scores, and of the target, hold: means over rows."""
    seen = torch.arange(scores.shape[1], device=rows.device) <= rows[:, None]
    ranked = torch.where(is_open, scores, torch.where(seen, -UNSEEN, UNSEEN))
    chosen = ranked.topk(top_k, dim=-1).indices
    best = target.topk(top_k, dim=-1).values.sum(-1)
    return target.gather(-1, chosen).sum(-1).mean(), best.mean()


def learning_rate(step, steps, peak, warmup):
    """Return the rate of a step: linear warm-up, then a cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
