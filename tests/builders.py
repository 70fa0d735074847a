"""Small random models, indexers and token sequences for the tests."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models import cache as lm_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import _get_classes
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mlx_dsa import Indexer, IndexerArgs
from mlx_dsa.checkpoint_file import LIGHTNING
from mlx_dsa.families import family_of
from mlx_dsa.patch import patch_of
from mlx_dsa.presets import resource
from mlx_dsa.registry import make_rule, rule_names

VOCAB = 101

# A budget that a short text outgrows, and the same with one selection a query.
SMALL_RULES = dict(top_k=24, n_sink=3, n_recent=5)
EXACT = dict(SMALL_RULES, prefill="exact")

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


def rules_alone():
    """Return the rules of selecting that read lightning indexers, or nothing."""
    return [n for n in rule_names("select") if make_rule("select", n).reads == LIGHTNING]


def build_model(config, *, seed=0, norms=True, bits=None, group_size=32, dtype=None):
    """Build a random model of mlx-lm from a config, in eval mode.

    Args:
        config (dict): As in a model's config.json.
        seed (int): Of the weights. None: from the random state as it is.
        norms (bool): Whether norms are random, too.
        bits (int): Of quantised weights. None: they are not.
        group_size (int): Of quantised weights.
        dtype (mx.Dtype): Of all others. None: as mlx-lm makes them.
    """
    if seed is not None:
        mx.random.seed(seed)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    if norms:
        randomize_norms(model)
    if bits is not None:
        nn.quantize(
            model,
            group_size=group_size,
            bits=bits,
            class_predicate=lambda p, m: hasattr(m, "to_quantized") and (not p.endswith("mlp.gate")),
        )
    if dtype is not None:
        model.set_dtype(dtype)
    model.eval()
    mx.eval(model.parameters())
    return model


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
    if kind == "qwen3_moe":
        fields.update(
            num_experts=4,
            num_experts_per_tok=2,
            decoder_sparse_step=1,
            mlp_only_layers=[0],
            moe_intermediate_size=hidden,
            norm_topk_prob=True,
        )
    return build_model(fields, seed=seed, bits=4 if quantized else None, dtype=dtype)


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


def with_heads(model, hidden=8):
    """Make random indexers whose retention scores differ clearly."""
    mx.random.seed(5)
    shape = IndexerArgs(model.args.hidden_size, 3, 12, 8, retention_dim=hidden)
    return {i: Indexer(shape) for i in range(len(model.layers))}


def layer_of(model, index=0):
    """Return an attention layer of a model, as the package sees it."""
    return family_of(model).layers(model)[index]


def make_tokens(length, seed=2, batch=1):
    """Return random token ids, int32 [batch, length]."""
    key = mx.random.key(seed)
    return mx.random.randint(0, VOCAB, (batch, length), key=key)


def make_text(length, seed=2):
    """Return tokens [1, length], none of them twice: two of one would be worth the same but
    for rounding, which differs by the cut."""
    return mx.array(np.random.default_rng(seed).permutation(1024)[None, :length].astype(np.int32))


def feed_layer(patch, x, calls):
    """Feed hidden states `[L, dim]` to a patch's layer 0 in calls of these lengths.

    Returns its answers `[L, dim]` and its cache; the model has one layer.
    """
    (cache,), parts, start = patch.make_cache(), [], 0
    for n in calls:
        part = mx.array(x[None, start : start + n].astype(np.float32))
        parts.append(np.array(patch.layers[0](part, None, cache)[0]))
        patch.end_prompts([cache])
        start += n
    return np.concatenate(parts), cache


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
    words = {f"w{i}": i for i in range(VOCAB)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0")
    return TokenizerWrapper(fast, eos_token_ids=[VOCAB + 1])


def letters_tokenizer(template):
    """Build a tokenizer with one token a character, fewer than VOCAB, and this chat template."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789 .,?<>\n"
    vocab = {c: i for i, c in enumerate(letters)} | {"#": len(letters)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="#"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template)


def bundled_tokenizer(template=None):
    """Load the bundled model's tokenizer, of transformers, with another chat template if one is given."""
    tokenizer = AutoTokenizer.from_pretrained(resource("weights/tiny"))
    tokenizer.chat_template = template or tokenizer.chat_template
    return tokenizer


def spy_widths(patch, monkeypatch):
    """Return a list that gets how many keys each dense attention of a patch sees."""
    seen = []
    for layer in patch.layers.values():

        def attend_all(queries, keys, values, *, causal, of=layer._attend_all):
            seen.append(keys.shape[2])
            return of(queries, keys, values, causal=causal)

        monkeypatch.setattr(layer, "_attend_all", attend_all)
    return seen
