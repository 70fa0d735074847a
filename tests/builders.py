"""Small random models, indexers and token sequences for the tests."""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models import cache as lm_cache
from mlx_lm.models import qwen3, qwen3_moe
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_dsa import Indexer, IndexerArgs
from mlx_dsa.families import family_of
from mlx_dsa.patch import patch_of

VOCAB = 101

# name -> what differs from the defaults of make_model: head groups of 1, 2, 4
# and all-in-one, odd widths, tied and untied heads, scaled RoPE.
SHAPES = {
    "mha": dict(hidden=48, heads=2, kv_heads=2, head_dim=32, layers=2),
    "gqa2": dict(),
    "gqa4-untied": dict(heads=8, kv_heads=2, head_dim=16, layers=3, tied=False),
    "mqa": dict(hidden=96, heads=3, kv_heads=1, head_dim=64, layers=1),
    "yarn": dict(
        rope_scaling={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    ),
    "4bit": dict(quantized=True),
    "moe": dict(kind="qwen3_moe"),
    "moe-4bit": dict(kind="qwen3_moe", quantized=True),
}


def make_model(
    kind="qwen3",
    *,
    seed=0,
    hidden=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=32,
    tied=True,
    rope_theta=10_000.0,
    rope_scaling=None,
    quantized=False,
    dtype=mx.float32,
    vocab=VOCAB,
):
    """Build a random Qwen3 or Qwen3-MoE model of mlx-lm, in eval mode."""
    mx.random.seed(seed)
    fields = dict(
        model_type=kind,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=2 * hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-6,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=4096,
    )
    module = qwen3
    if kind == "qwen3_moe":
        module = qwen3_moe
        fields.update(
            num_experts=4,
            num_experts_per_tok=2,
            decoder_sparse_step=1,
            mlp_only_layers=[0],
            moe_intermediate_size=hidden,
            norm_topk_prob=True,
        )
    model = module.Model(module.ModelArgs(**fields))
    randomize_norms(model)
    if quantized:
        nn.quantize(
            model,
            group_size=32,
            bits=4,
            class_predicate=lambda p, m: hasattr(m, "to_quantized") and (not p.endswith("mlp.gate")),
        )
    model.set_dtype(dtype)
    model.eval()
    mx.eval(model.parameters())
    return model


def randomize_norms(model):
    """Give every RMSNorm a weight other than one, so that leaving it out shows."""
    for _, module in model.named_modules():
        if isinstance(module, nn.RMSNorm):
            module.weight = mx.random.uniform(0.5, 1.5, module.weight.shape)


def make_indexers(model, *, seed=1, n_heads=3, head_dim=12, rope_dim=8, layers=None, norm=False, retention_dim=0):
    """Build random indexers for a model: every layer, or those in `layers`."""
    mx.random.seed(seed)
    args = IndexerArgs(
        dim=model.args.hidden_size,
        index_n_heads=n_heads,
        index_head_dim=head_dim,
        index_rope_dim=rope_dim,
        norm=norm,
        retention_dim=retention_dim,
    )
    indexers = {}
    for layer in range(len(model.layers)) if layers is None else layers:
        indexers[layer] = Indexer(args)
        randomize_norms(indexers[layer])
        mx.eval(indexers[layer].parameters())
    return indexers


def layer_of(model, index=0):
    """Return an attention layer of a model, as the package sees it."""
    return family_of(model).layers(model)[index]


def make_tokens(length, seed=2, batch=1):
    """Return random token ids, int32 [batch, length]."""
    key = mx.random.key(seed)
    return mx.random.randint(0, VOCAB, (batch, length), key=key)


def feed(model, tokens, chunk, cache=None):
    """Feed tokens [B, L] in calls of `chunk`; return the cache and all logits."""
    cache = lm_cache.make_prompt_cache(model) if cache is None else cache
    calls = [min(chunk, tokens.shape[1] - i) for i in range(0, tokens.shape[1], chunk)]
    return cache, mx.concatenate(feed_calls(model, tokens, calls, cache), axis=1)


def feed_calls(model, tokens, calls, cache):
    """Feed tokens [B, L] in calls of these lengths; return the logits of each call.

    The first call of one token ends a prompt, and is seen to: `state` is not read.
    """
    patch, parts, start = patch_of(model), [], 0
    for length in calls:
        parts.append(model(tokens[:, start : start + length], cache=cache))
        mx.eval(parts[-1])
        if patch is not None:
            patch.end_prompts(cache)
        start += length
    return parts


def snapshot(model):
    """Return copies of all parameters, to compare with `same_tree`."""
    return tree_map(lambda p: mx.array(p), model.parameters())


def make_tokenizer():
    """Build a tokenizer with one word per token, for `stream_generate`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCAB)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0")
    return TokenizerWrapper(fast, eos_token_ids=[VOCAB + 1])


def spy_widths(patch, monkeypatch):
    """Return a list that gets how many keys each dense attention of a patch sees."""
    seen = []
    for layer in patch.layers.values():

        def attend_all(queries, keys, values, *, causal, of=layer._attend_all):
            seen.append(keys.shape[2])
            return of(queries, keys, values, causal=causal)

        monkeypatch.setattr(layer, "_attend_all", attend_all)
    return seen
