"""Models of a known shape with random weights: speed does not depend on them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama, qwen2, qwen3

from ..indexer import Indexer, IndexerArgs
from ..machine import runs_float32

_GROUP = 64
_BITS = (2, 3, 4, 6, 8, 16)
# Positions of a model with random weights: more than any context that fits in memory.
_POSITIONS = 1 << 20
# The published indexers of Qwen3-8B: heads, dims of a head, dims that RoPE rotates.
_INDEXER = (6, 69, 64)
_RETENTION_DIM = 64
_MODULES = {"qwen3": qwen3, "qwen2": qwen2, "llama": llama}


class BenchShape(NamedTuple):
    """What a model and its indexers are made of.

    Args:
        hidden_size (int): Width of the hidden state.
        n_layers (int): Layers.
        intermediate_size (int): Width of the MLP.
        n_heads (int): Query heads.
        n_kv_heads (int): Key heads.
        head_dim (int): Dims of a head.
        vocab_size (int): Tokens.
        tied (bool): Whether input and output share one embedding.
        indexer (tuple of int): Index heads, dims of one, dims that RoPE rotates.
        retention_dim (int): Width of the retention head's hidden layer.
        model_type (str): As in the model's config. Default: ``"qwen3"``.
        rope_theta (float): Base of the model's RoPE. Default: ``1e6``.
    """

    hidden_size: int
    n_layers: int
    intermediate_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    indexer: tuple[int, int, int] = _INDEXER
    retention_dim: int = _RETENTION_DIM
    model_type: str = "qwen3"
    rope_theta: float = 1e6


# Indexers of models with small heads.
_SMALL_INDEXER = (4, 64, 32)

BENCH_SHAPES = {
    "qwen3-8b": BenchShape(4096, 36, 12288, 32, 8, 128, 151936, False),
    "qwen3-4b": BenchShape(2560, 36, 9728, 32, 8, 128, 151936, True),
    "qwen3-0.6b": BenchShape(1024, 28, 3072, 16, 8, 128, 151936, True),
    "qwen2.5-coder-0.5b": BenchShape(896, 24, 4864, 14, 2, 64, 151936, True, _SMALL_INDEXER, 64, "qwen2"),
    "smollm2-135m": BenchShape(576, 30, 1536, 9, 3, 64, 49152, True, _SMALL_INDEXER, 64, "llama", 1e5),
    # That of the bundled model.
    "tiny": BenchShape(256, 8, 768, 4, 2, 64, 4096, True, (4, 32, 16), 32),
}


def random_model(name: str, bits: int = 4, seed: int = 0) -> tuple[nn.Module, dict[int, Indexer]]:
    """Make a model and its indexers, with random weights, in a dtype fit for the device.

    Quantised weights are drawn as such, so an 8B model takes seconds and no more
    memory than it needs.

    Args:
        name (str): A key of ``BENCH_SHAPES``.
        bits (int): Bits of a weight, in groups of 64; 16 for weights that are not
          quantised. Default: ``4``.
        seed (int): Of the weights. Default: ``0``.

    Returns:
        tuple: The model, and layer number to :class:`Indexer`.

    Raises:
        ValueError: If the shape or the number of bits is unknown.
    """
    if name not in BENCH_SHAPES:
        raise ValueError(f"[bench] 'model_shape' must be one of {', '.join(BENCH_SHAPES)} but got {name!r}.")
    if bits not in _BITS:
        raise ValueError(f"[bench] 'bits' must be one of {', '.join(map(str, _BITS))} but got {bits!r}.")
    shape = BENCH_SHAPES[name]
    dtype = mx.float32 if runs_float32() else mx.bfloat16
    mx.random.seed(seed)
    module = _MODULES[shape.model_type]
    model = module.Model(module.ModelArgs.from_dict(_model_args(shape)))
    model.set_dtype(dtype)
    if bits < 16:
        nn.quantize(model, group_size=_GROUP, bits=bits)
    _randomise(model, bits)
    model.eval()
    args = IndexerArgs(shape.hidden_size, *shape.indexer, retention_dim=shape.retention_dim)
    indexers = {}
    for layer in range(shape.n_layers):
        indexers[layer] = Indexer(args)
        indexers[layer].set_dtype(dtype)
        mx.eval(indexers[layer].parameters())
    return model, indexers


def _model_args(shape: BenchShape) -> dict[str, Any]:
    return dict(
        model_type=shape.model_type,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.n_layers,
        intermediate_size=shape.intermediate_size,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.tied,
        rms_norm_eps=1e-6,
        rope_theta=shape.rope_theta,
        max_position_embeddings=_POSITIONS,
    )


def _randomise(model: nn.Module, bits: int):
    """Replace weights that were never computed, one at a time."""
    for _, module in model.named_modules():
        arrays = [(n, a) for n, a in module.items() if isinstance(a, mx.array)]
        for name, old in arrays:
            module[name] = _random_like(name, old, bits)
            mx.eval(module[name])


def _random_like(name: str, old: mx.array, bits: int) -> mx.array:
    if name == "bias":
        return mx.zeros(old.shape, old.dtype)
    if old.ndim == 1:
        return mx.ones(old.shape, old.dtype)  # of a norm
    if old.dtype == mx.uint32:
        halves = (*old.shape[:-1], 2 * old.shape[-1])
        return mx.random.randint(0, 1 << 16, halves, mx.uint16).view(mx.uint32)
    # Uniform numbers of variance 1 / inputs: from -limit to limit.
    limit = math.sqrt(3 / (old.shape[-1] * (1 if bits == 16 else _GROUP)))
    if name == "scales":
        return mx.full(old.shape, 2 * limit / (2**bits - 1), old.dtype)
    if name == "biases":
        return mx.full(old.shape, -limit, old.dtype)
    return mx.random.uniform(-limit, limit, old.shape, old.dtype)
