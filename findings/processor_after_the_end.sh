#!/usr/bin/env bash
# mlx-lm 0.32.2 with mlx 0.32.4 (mlx[cpu]), transformers 5.24.0, Python 3.11, Linux x86-64.
#
# mlx-lm computes one token ahead: the logits processors and the sampler are called once more than there are
# tokens, with the end-of-text token (or the last one asked for) already among the tokens, and the KV cache
# holds that token too when generation is over.
#
# Seen (a prompt of five tokens; the model is stopped at its third token, then by max_tokens = 3):
#   stopped at the end of text: tokens [7, 7, 23], processor asked after [[], [7], [7, 7], [7, 7, 23]], cache of 8
#   stopped by max_tokens: tokens [7, 7, 23], processor asked after [[], [7], [7, 7], [7, 7, 23]], cache of 8
#
# Why it matters: a grammar matcher as a processor is asked to go on after it has ended and may raise, counters
# are one too high, and a cache that is used again holds an end of text that the text does not show.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export HF_HUB_OFFLINE=1
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' \
    mlx-lm==0.32.2 transformers==5.24.0 tokenizers==0.23.3
venv/bin/python - <<'PY'
import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models import qwen3
from mlx_lm.models.cache import make_prompt_cache

mx.set_default_device(mx.cpu)
model = qwen3.Model(qwen3.ModelArgs.from_dict(dict(
    model_type="qwen3", hidden_size=64, num_hidden_layers=1, intermediate_size=64, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, rms_norm_eps=1e-6, vocab_size=24, max_position_embeddings=512,
    rope_theta=10000.0, tie_word_embeddings=True,
)))
END = 23
prompt = [1, 2, 3, 4, 5]


def run(max_tokens):
    """A processor that makes the model say 7, 7, END; the loop stops at END as stream_generate does."""
    asked, tokens, cache = [], [], make_prompt_cache(model)

    def grammar(so_far, logits):
        asked.append(so_far.tolist()[len(prompt):])
        wanted = END if len(asked[-1]) == 2 else 7
        return mx.where(mx.arange(24) == wanted, 0.0, -1e9) + 0 * logits

    for token, _ in generate_step(
        mx.array(prompt), model, max_tokens=max_tokens, prompt_cache=cache, logits_processors=[grammar]
    ):
        tokens.append(token)
        if token == END:
            break
    return tokens, asked, cache[0].offset


for name, max_tokens in (("stopped at the end of text", 10), ("stopped by max_tokens", 3)):
    tokens, asked, held = run(max_tokens)
    print(f"{name}: tokens {tokens}, processor asked after {asked}, cache of {held}")
    assert tokens == [7, 7, END] and asked[-1] == tokens and len(asked) == 4
    assert held == len(prompt) + len(tokens)
PY
