"""Read off which keys a patched attention attends to.

A layer whose values carry their own position, one-hot, and whose output is the
plain sum over heads, returns its attention weights: position s is in the set of
query t exactly if the output of t has something at s. Nothing inside the program
is looked at.
"""

import mlx.core as mx
import numpy as np
from builders import make_indexers, make_model
from mlx_lm.models.base import create_attention_mask
from simulate import MARGIN

from mlx_dsa import patch_sparse_generate
from numpy_reference import ReferenceModel, Rules

CONTENT = 24


class Probe:
    """A one-layer model and random hidden states for `length` tokens.

    Args:
        length (int): Tokens.
        seed (int): Of the hidden states.
        **shape: Arguments of `make_indexers`.
    """

    def __init__(self, length, seed=0, heads=4, kv_heads=2, batch=1, **shape):
        width = length + length % 2  # RoPE turns pairs
        hidden = CONTENT + width
        self.model = make_model(hidden=hidden, layers=1, heads=heads, kv_heads=kv_heads, head_dim=width)
        attention = self.model.layers[0].self_attn
        for name in ("q_proj", "k_proj"):
            weight = np.array(getattr(attention, name).weight)
            weight[:, CONTENT:] = 0
            getattr(attention, name).weight = mx.array(weight)
        onehot = np.zeros((width, hidden), np.float32)
        onehot[:, CONTENT:] = np.eye(width)
        attention.v_proj.weight = mx.array(np.tile(onehot, (kv_heads, 1)))
        attention.o_proj.weight = mx.array(np.tile(onehot.T, (1, heads)))

        self.indexers = make_indexers(self.model, **shape)
        for name in ("wq", "wk", "weights_proj"):
            layer = getattr(self.indexers[0], name)
            weight = np.array(layer.weight) * np.sqrt(hidden / CONTENT)
            weight[:, CONTENT:] = 0
            layer.weight = mx.array(weight)
        self.reference = ReferenceModel(self.model, self.indexers)

        x = np.zeros((batch, length, hidden), np.float32)
        noise = np.random.default_rng(seed)
        x[:, :, :CONTENT] = noise.standard_normal((batch, length, CONTENT))
        x[:, :, CONTENT:] = np.eye(width)[:length]
        self.x = x

    def program(self, calls, row=0, **rules):
        """Return position -> set, with the patched attention fed in `calls`."""
        sets, start = {}, 0
        rules = {"evict": "index", **rules}
        with patch_sparse_generate(self.model, self.indexers, **rules) as patch:
            cache = patch.make_cache()[0]
            attention = self.model.layers[0].self_attn
            for length in calls:
                x = mx.array(self.x[:, start : start + length])
                out = attention(x, create_attention_mask(x, cache), cache)
                mx.eval(out)
                patch.end_prompts([cache])
                weights = np.array(out)[row, :, CONTENT:]
                for i, w in enumerate(weights):
                    sets[start + i] = frozenset(np.flatnonzero(w).tolist())
                start += length
        return sets

    def expected(self, calls, row=0, **rules):
        """Return position -> set by the reference, and the smallest margin."""
        run = self.reference.start(Rules(**rules))
        start = 0
        for length in calls:
            x = self.x[row, start : start + length].astype(np.float64)
            run.attend(0, self.reference.layers[0], x)
            start += length
        return run.selected[0], min(run.rules.margins, default=1.0)


def clear_probe(calls, rules, **shape):
    """Return a probe and the expected sets, where float32 can't decide otherwise.

    Args:
        calls (list of int): Length of each call.
        rules (dict): Fields of `Rules`.
        **shape: Arguments of `Probe`.
    """
    for seed in range(300):
        probe = Probe(sum(calls), seed=seed, **shape)
        sets, margin = probe.expected(calls, **rules)
        if margin > MARGIN:
            return probe, sets
    raise AssertionError("no hidden states with clear selections")
