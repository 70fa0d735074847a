"""The recipe of the pretrained models learns in PyTorch what `mlx-dsa train` learns in MLX.

PyTorch is no dependency of the project, so what it computed is recorded; where it is installed, it
computes it again. `python tests/test_recipe_losses.py` writes the record.
"""

import json
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from family_models import COMMON, family_model
from mlx.utils import tree_flatten
from recipe_modules import PRETRAINED, recipe_imports

from mlx_dsa import Indexer, IndexerArgs
from mlx_dsa.families import family_of
from mlx_dsa.indexer import RetentionHead
from mlx_dsa.train.config import TrainConfig
from mlx_dsa.train.loss import distillation_loss, open_keys, row_scores
from mlx_dsa.train.retention import retention_loss
from mlx_dsa.train.teacher import attention_target, future_attention, layer_views

RECORD = Path(__file__).with_name("recipe_losses.json")
DIM, LENGTH, HIDDEN, SHAPE = COMMON["hidden_size"], 160, 8, (2, 16, 8)
N_SINK, N_RECENT, DISTANCE, N_KEYS = 4, 32, 32, 100
TOKENS = np.random.default_rng(0).integers(0, COMMON["vocab_size"], LENGTH)
ROWS = np.sort(np.random.default_rng(1).integers(64, LENGTH, 24))
FAMILIES = ("qwen2", "llama-plain")


def model_of(name):
    return family_model("llama", rope_scaling=None) if name == "llama-plain" else family_model(name)


def parameters(layer):
    """Return what is trained beside a layer, for the unweighted state, as arrays by name."""
    rng = np.random.default_rng([2, layer])
    n_heads, head_dim, _ = SHAPE
    shapes = {
        "wq.weight": (n_heads * head_dim, DIM), "wq.bias": (n_heads * head_dim,),
        "wk.weight": (head_dim, DIM), "wk.bias": (head_dim,), "weights_proj.weight": (n_heads, DIM),
        "up.weight": (HIDDEN, DIM), "up.bias": (HIDDEN,), "down.weight": (1, HIDDEN), "down.bias": (1,),
    }  # fmt: skip
    return {k: rng.normal(0, 0.3, s).astype(np.float32) for k, s in shapes.items()}


def mlx_figures(name):
    """Return losses and norms of their gradients of every layer, as the trainer computes them."""
    model = model_of(name)
    config = TrainConfig(top_k=64, n_sink=N_SINK, n_recent=N_RECENT)
    rows, found = mx.array(ROWS.astype(np.int32))[None], {}
    n_heads, head_dim, rope_dim = SHAPE
    for n, view in layer_views(model, mx.array(TOKENS)[None], 64):
        given = {k: mx.array(v) for k, v in parameters(n).items()}
        args = IndexerArgs(DIM, n_heads, head_dim, rope_dim, unweighted=True)
        indexer, head = Indexer(args), RetentionHead(DIM, HIDDEN)
        indexer.load_weights([(k, v) for k, v in given.items() if k.startswith("w")])
        head.load_weights([(k, v) for k, v in given.items() if not k.startswith("w")])
        layer = family_of(model).layers(model)[n]
        head.up.weight = head.up.weight / layer.norm_weight
        indexer = indexer.bind(layer, mx.float32, fused=False)
        target = attention_target(view, rows)
        future = future_attention(view, np.arange(LENGTH, dtype=np.int32)[None], DISTANCE)
        is_open = open_keys(rows, LENGTH, config)

        def of_indexer(p, indexer=indexer, view=view, target=target, is_open=is_open):
            indexer.update(p)
            return distillation_loss(row_scores(indexer, view.x, rows), target, is_open, config)

        def of_head(p, head=head, view=view, future=future):
            head.update(p)
            return retention_loss(head(view.x), future, mx.arange(LENGTH)[None] < N_KEYS)

        for kind, function, module in (("indexer", of_indexer, indexer), ("head", of_head, head)):
            loss, gradient = mx.value_and_grad(function)(module.trainable_parameters())
            biases = [v for k, v in tree_flatten(gradient) if k.endswith("bias")]
            norm = sum((b**2).sum() for b in biases) ** 0.5
            found[f"{name} {n} {kind}"] = [loss.item(), norm.item()]
    return found


def torch_figures(name):
    """Return the same as the recipe computes it."""
    torch = pytest.importorskip("torch")
    with recipe_imports(PRETRAINED):
        import heads
        import targets
        from teacher import Teacher

    model, found = model_of(name), {}
    config = {**COMMON, "model_type": "qwen2" if name == "qwen2" else "llama"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        mx.save_safetensors(f"{folder}/model.safetensors", dict(tree_flatten(model.parameters())))
        teacher = Teacher(folder, "cpu", torch.float32)
    rows = torch.tensor(ROWS)
    with torch.no_grad():
        views = list(teacher.views(torch.tensor(TOKENS)))
    for n, view, lse, _ in views:
        given = {k: torch.tensor(v) for k, v in parameters(n).items()}
        indexer, head = heads.Indexer(DIM, *SHAPE, theta=teacher.theta), heads.RetentionHeads(DIM, 1, HIDDEN)
        indexer.load_state_dict({k: v for k, v in given.items() if k.startswith("w")})
        of_head = {k: v for k, v in given.items() if not k.startswith("w")}
        of_head["down"], of_head["bias"] = of_head.pop("down.weight"), of_head.pop("down.bias")
        head.load_state_dict(of_head)
        with torch.no_grad():
            target = targets.attention_target(view, lse, rows)
            future = targets.future_attention(view, lse, torch.arange(LENGTH), DISTANCE)
        is_open = heads.open_keys(rows, LENGTH, N_SINK, N_RECENT)
        losses = {
            "indexer": heads.distillation_loss(indexer(view.x, rows), target, is_open),
            "head": heads.retention_loss(head(view.x)[0, :N_KEYS], future[:N_KEYS], "odds"),
        }
        for kind, module in (("indexer", indexer), ("head", head)):
            losses[kind].backward()
            norm = sum(p.grad.pow(2).sum() for k, p in module.named_parameters() if k.endswith("bias"))
            found[f"{name} {n} {kind}"] = [losses[kind].item(), norm.sqrt().item()]
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_mlx_computes_what_was_recorded_of_pytorch(name):
    recorded = json.loads(RECORD.read_text())
    found = mlx_figures(name)
    assert found.keys() == {k for k in recorded if k.startswith(name)} and len(found) == 4
    for key, values in found.items():
        np.testing.assert_allclose(values, recorded[key], rtol=1e-3, err_msg=key)
    # They tell layers, and indexers from heads, apart.
    assert len({round(loss, 3) for loss, _ in found.values()}) == 4


@pytest.mark.parametrize("name", FAMILIES)
def test_pytorch_computes_what_was_recorded(name):
    recorded = json.loads(RECORD.read_text())
    for key, values in torch_figures(name).items():
        np.testing.assert_allclose(values, recorded[key], rtol=1e-3, err_msg=key)


if __name__ == "__main__":
    figures = {k: v for name in FAMILIES for k, v in torch_figures(name).items()}
    RECORD.write_text(json.dumps(figures, indent=1) + "\n")
