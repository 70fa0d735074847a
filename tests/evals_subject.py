"""A small random model with the bundled tokenizer, as the evaluators take it."""

from builders import build_model, make_indexers
from local_models import SIZES
from mlx_lm.tokenizer_utils import load

from mlx_dsa import Preset, SparseConfig
from mlx_dsa.presets import resource


def make_subject(tied=True, retention_dim=0, **config):
    """Build the model, its tokenizer and random indexers, with a small config.

    A tied model repeats its input; one that is not says something else each time.
    """
    model = build_model({**SIZES, "tie_word_embeddings": tied}, norms=False)
    evict = "retention" if retention_dim else "index"  # what there is no head for is told
    settings = {"top_k": 64, "n_sink": 4, "n_recent": 16, "evict": evict, **config}
    tokenizer = load(resource("weights/tiny"))
    return Preset(model, tokenizer, make_indexers(model, retention_dim=retention_dim), SparseConfig(**settings))
