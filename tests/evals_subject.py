"""A small random model with the bundled tokenizer, as the evaluators take it."""

import mlx.core as mx
from builders import make_indexers
from local_models import SIZES
from mlx_lm.models import qwen3
from mlx_lm.tokenizer_utils import load

from mlx_dsa import Preset, SparseConfig
from mlx_dsa.presets import resource


def make_subject(tied=True, retention_dim=0, **config):
    """Build the model, its tokenizer and random indexers, with a small config.

    A tied model repeats its input; one that is not says something else each time.
    """
    mx.random.seed(0)
    sizes = {**SIZES, "tie_word_embeddings": tied}
    model = qwen3.Model(qwen3.ModelArgs.from_dict(sizes))
    model.eval()
    mx.eval(model.parameters())
    evict = "retention" if retention_dim else "index"  # what there is no head for is told
    settings = {"top_k": 64, "n_sink": 4, "n_recent": 16, "evict": evict, **config}
    tokenizer = load(resource("weights/tiny"))
    return Preset(model, tokenizer, make_indexers(model, retention_dim=retention_dim), SparseConfig(**settings))
