"""Small random models and indexers in folders shaped like the hub's."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from builders import build_model
from mlx.utils import tree_flatten

from mlx_dsa import Indexer, IndexerArgs, save_indexers
from mlx_dsa.presets import resource

SIZES = dict(
    model_type="qwen3",
    hidden_size=64,
    num_hidden_layers=2,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    rms_norm_eps=1e-6,
    vocab_size=4096,
    max_position_embeddings=8192,
    rope_theta=1e5,
    tie_word_embeddings=True,
)


def write_model(folder: Path, *, quantized=False, dtype=mx.float32, **changes) -> Path:
    """Write a model folder that mlx_lm.load reads, with the bundled tokenizer."""
    folder.mkdir(parents=True)
    config = {**SIZES, **changes}
    model = build_model({**config, "model_type": "qwen3"}, seed=None, norms=False, dtype=dtype)
    if quantized:
        config["quantization"] = {"group_size": 64, "bits": 4}
        nn.quantize(model, group_size=64, bits=4)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    config["eos_token_id"] = [2, 0]
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resource("weights/tiny") / name, folder / name)
    return folder


def write_indexers(folder: Path, *, dim=SIZES["hidden_size"], layers=2, **shape) -> Path:
    """Write an indexer folder: one safetensors file and its run_config.json."""
    sizes = dict(index_n_heads=2, index_head_dim=16, index_rope_dim=8)
    args = IndexerArgs(dim=dim, **{**sizes, **shape})
    save_indexers(folder, {layer: Indexer(args) for layer in range(layers)})
    return folder
