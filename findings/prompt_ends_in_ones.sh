#!/usr/bin/env bash
# mlx-lm 0.32.2 with mlx 0.32.4 (mlx[cpu]), transformers 5.24.0, Python 3.11, Linux x86-64.
#
# mlx_lm.generate.generate_step reads a prompt in steps of prefill_step_size and always keeps its last token back
# for a call of its own. A prompt of k * prefill_step_size + 2 tokens so ends in two calls of one token each,
# which have the shape of decoding; one token less or more and only one call has it.
#
# Seen (tokens a call of the model, prefill_step_size = 8, max_tokens = 3):
#   prompt of 17 tokens: [8, 8, 1] of the prompt, then [1, 1, 1]
#   prompt of 18 tokens: [8, 8, 1, 1] of the prompt, then [1, 1, 1]
#   prompt of 19 tokens: [8, 8, 2, 1] of the prompt, then [1, 1, 1]
#
# Why it matters: a KV cache or a layer that tells "prompt" from "decode" by the length of the call (to prune,
# to switch kernels, to count steps) takes a piece of such prompts for answers, at one length in 2048.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' \
    mlx-lm==0.32.2 transformers==5.24.0 tokenizers==0.23.3
venv/bin/python - <<'PY'
import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models import qwen3

mx.set_default_device(mx.cpu)
model = qwen3.Model(qwen3.ModelArgs.from_dict(dict(
    model_type="qwen3", hidden_size=64, num_hidden_layers=1, intermediate_size=64, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, rms_norm_eps=1e-6, vocab_size=64, max_position_embeddings=512,
    rope_theta=10000.0, tie_word_embeddings=True,
)))


class Counted:
    layers = model.layers

    def __init__(self):
        self.calls = []

    def __call__(self, tokens, cache=None):
        self.calls.append(tokens.shape[1])
        return model(tokens, cache=cache)


seen = {}
for length in (17, 18, 19):
    counted = Counted()
    list(generate_step(mx.arange(length), counted, max_tokens=3, prefill_step_size=8))
    seen[length] = counted.calls
    prompt, reach = [], 0
    for call in counted.calls:
        if reach < length:
            prompt.append(call)
            reach += call
    print(f"prompt of {length} tokens: {prompt} of the prompt, then {counted.calls[len(prompt):]}")
assert seen == {17: [8, 8, 1, 1, 1, 1], 18: [8, 8, 1, 1, 1, 1, 1], 19: [8, 8, 2, 1, 1, 1, 1]}, seen
PY
