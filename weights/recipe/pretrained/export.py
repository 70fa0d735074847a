"""Write what train.py made as the folder of a preset: indexers.safetensors and run_config.json.

python export.py RUN weights/qwen2.5-coder-0.5b --model-type qwen2 --heads log-asked
"""

import argparse
import json
from pathlib import Path

from mlx_dsa import Indexer, IndexerArgs, save_indexers  # before MLX, for OpenBLAS

# isort: split
import mlx.core as mx


def export(run, out, heads, model_type):
    """Put indexers and one kind of heads together, in 8 bits.

    Args:
        run, out (str): folders.
        heads (str): which heads of the run.
        model_type (str): of the model, for run_config.json.
    """
    run = Path(run)
    made = mx.load(str(run / "indexers.safetensors")) | mx.load(str(run / f"heads-{heads}.safetensors"))
    told = json.loads((run / "run.json").read_text())
    n_heads, head_dim, rope_dim = told["shape"]
    layers = {}
    for name, value in made.items():
        _, layer, key = name.split(".", 2)
        layers.setdefault(int(layer), []).append((key, value))
    first = dict(layers[0])
    args = IndexerArgs(
        dim=first["wk.weight"].shape[1],
        index_n_heads=n_heads,
        index_head_dim=head_dim,
        index_rope_dim=rope_dim,
        retention_dim=first["retention.up.weight"].shape[0],
        unweighted=True,
    )
    indexers = {}
    for layer, tensors in sorted(layers.items()):
        indexers[layer] = Indexer(args)
        indexers[layer].load_weights(tensors)
    metadata = {
        "model_type": model_type,
        "num_hidden_layers": len(layers),
        "train": {**told, "heads": heads, "by": "weights/recipe/pretrained/train.py"},
    }
    return save_indexers(out, indexers, metadata, bits=8)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("out")
    parser.add_argument("--heads", default="log-asked")
    parser.add_argument("--model-type", default="qwen2")
    args = parser.parse_args()
    print(export(args.run, args.out, args.heads, args.model_type))
