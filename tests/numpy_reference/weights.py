"""Copy an mlx-lm Qwen3 or Qwen3-MoE model, and its indexers, to float64."""

import math
from types import SimpleNamespace

import mlx.core as mx
import numpy as np


def to_numpy(array):
    """Convert an MLX array of any float type to float64."""
    return np.array(array.astype(mx.float32), dtype=np.float64)


def weight_of(module):
    """Return a layer's weight, dequantised if it is quantised."""
    if "scales" not in module:
        return to_numpy(module.weight)
    return to_numpy(
        mx.dequantize(
            module.weight,
            module.scales,
            module.biases,
            group_size=module.group_size,
            bits=module.bits,
        )
    )


def linear(module):
    """Return a function x -> x W^T + b with the weights of `module`."""
    weight = weight_of(module)
    bias = to_numpy(module.bias) if "bias" in module else 0.0
    return lambda x: x @ weight.T + bias


def rms_norm(weight, eps):
    weight = to_numpy(weight)
    return lambda x: x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def silu(x):
    return x / (1.0 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def inverse_frequencies(dims, base, scaling):
    """Return the angle per position of each pair, and the scale of the input.

    "linear" divides the positions by the factor, "yarn" blends the two by
    wavelength (Peng et al. 2023, section 3.4). Anything else is plain RoPE.
    """
    freqs = base ** (-np.arange(0, dims, 2) / dims)
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    if kind == "linear":
        return freqs / scaling["factor"], 1.0
    if kind == "yarn":
        factor = scaling["factor"]
        original = scaling["original_max_position_embeddings"]

        def dim_of(rotations):
            return dims * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(dim_of(scaling.get("beta_fast", 32))), 0)
        high = min(math.ceil(dim_of(scaling.get("beta_slow", 1))), dims - 1)
        high += 0.001 if low == high else 0
        ramp = np.clip((np.arange(dims // 2) - low) / (high - low), 0, 1)
        return freqs * (1 - ramp) + freqs / factor * ramp, 0.1 * math.log(factor) + 1
    assert kind == "default", kind
    return freqs, 1.0


def rope(dims, base, scaling):
    """Return a function that rotates [L, heads, D] at positions [L].

    Pairs are half-split: dimension i turns with i + dims / 2.
    """
    freqs, scale = inverse_frequencies(dims, base, scaling)

    def apply(x, positions):
        angle = positions[:, None, None] * freqs
        cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
        a, b = x[..., : dims // 2], x[..., dims // 2 : dims]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., dims:]], axis=-1)

    return apply


def dense_mlp(module):
    gate, up, down = map(linear, (module.gate_proj, module.up_proj, module.down_proj))
    return lambda x: down(silu(gate(x)) * up(x))


def expert_mlp(module):
    router = linear(module.gate)
    experts = module.switch_mlp
    gate, up, down = map(weight_of, (experts.gate_proj, experts.up_proj, experts.down_proj))

    def apply(x):
        out = np.zeros_like(x)
        probabilities = softmax(router(x))
        for row, p in enumerate(probabilities):
            chosen = np.argsort(-p)[: module.top_k]
            share = p[chosen] / (p[chosen].sum() if module.norm_topk_prob else 1.0)
            for e, s in zip(chosen, share):
                hidden = silu(gate[e] @ x[row]) * (up[e] @ x[row])
                out[row] += s * (down[e] @ hidden)
        return out

    return apply


def copy_layer(block, args):
    """Copy one transformer block."""
    attention, mlp = block.self_attn, block.mlp
    # qwen3_moe builds a plain RoPE whatever its config says about scaling.
    scaling = args.rope_scaling if args.model_type == "qwen3" else None
    return SimpleNamespace(
        input_norm=rms_norm(block.input_layernorm.weight, args.rms_norm_eps),
        mlp_norm=rms_norm(block.post_attention_layernorm.weight, args.rms_norm_eps),
        q_norm=rms_norm(attention.q_norm.weight, args.rms_norm_eps),
        k_norm=rms_norm(attention.k_norm.weight, args.rms_norm_eps),
        q=linear(attention.q_proj),
        k=linear(attention.k_proj),
        v=linear(attention.v_proj),
        o=linear(attention.o_proj),
        rope=rope(args.head_dim, args.rope_theta, scaling),
        mlp=expert_mlp(mlp) if "switch_mlp" in mlp else dense_mlp(mlp),
        head_dim=args.head_dim,
        n_heads=args.num_attention_heads,
        n_kv_heads=args.num_key_value_heads,
    )


def copy_retention(head):
    """Return a function from hidden states [L, dim] to what a retention head says of them [L]."""
    up, down = linear(head.up), linear(head.down)

    def apply(x):
        h = up(x)
        gelu = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        return down(gelu)[:, 0]

    return apply


def copy_indexer(indexer, args):
    """Copy one lightning indexer; RoPE has the model's base and scaling."""
    n_heads = indexer.args.index_n_heads
    head_dim = indexer.args.index_head_dim
    dims = indexer.args.index_rope_dim
    scaling = args.rope_scaling if args.model_type == "qwen3" else None
    rotate = rope(dims, args.rope_theta, scaling) if dims else (lambda x, p: x)
    wq, wk, head_weights = map(linear, (indexer.wq, indexer.wk, indexer.weights_proj))
    norms = [lambda x: x, lambda x: x]
    if indexer.args.norm:
        norms = [rms_norm(n.weight, n.eps) for n in (indexer.q_norm, indexer.k_norm)]

    def queries(x, positions):
        q = norms[0](wq(x)).reshape(len(x), n_heads, head_dim)
        return rotate(q, positions), head_weights(x)

    def keys(x, positions):
        return rotate(norms[1](wk(x))[:, None], positions)[:, 0]

    def scores(q, w, k):
        products = np.maximum(np.einsum("lhd,td->lht", q, k), 0.0)
        return np.einsum("lh,lht->lt", w, products) / math.sqrt(n_heads * head_dim)

    retention = copy_retention(indexer.retention) if indexer.has_retention else None
    return SimpleNamespace(queries=queries, keys=keys, scores=scores, retention=retention)
