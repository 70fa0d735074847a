#!/usr/bin/env bash
# mlx-lm 0.32.2 with mlx 0.32.4 (mlx[cpu]), transformers 5.24.0, Python 3.11, Linux x86-64.
#
# mlx-lm's save_prompt_cache writes the buffers of a KVCache, not its entries: keys and values in steps of 256
# slots, so the file of a one-token prompt is as large as that of 256 tokens. trim_prompt_cache moves a counter
# only, so what was trimmed away is still in the file, and load_prompt_cache reads it back in.
#
# Seen (one layer, one head of 32 numbers, float32):
#   1 tokens: 256 slots, 65816 bytes
#   256 tokens: 256 slots, 65816 bytes
#   257 tokens: 512 slots, 131353 bytes
#   200 tokens trimmed to 1: the other 199 are in the file: True
#
# Why it matters: a store of many short prefixes takes up to 256 times the place, and trimming a cache before it is
# saved saves nothing: cut keys and values to the offset (and make them contiguous) first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export HF_HUB_OFFLINE=1
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' \
    mlx-lm==0.32.2 transformers==5.24.0 tokenizers==0.23.3
venv/bin/python - <<'PY'
import os

import mlx.core as mx
from mlx_lm.models.cache import KVCache, load_prompt_cache, save_prompt_cache, trim_prompt_cache

mx.set_default_device(mx.cpu)


def filled(tokens):
    cache = [KVCache()]
    entries = mx.random.normal((1, 1, tokens, 32), key=mx.random.key(0))
    cache[0].update_and_fetch(entries, entries)
    return cache


sizes = {}
for tokens in (1, 256, 257):
    save_prompt_cache("one.safetensors", filled(tokens))
    sizes[tokens] = os.path.getsize("one.safetensors")
    slots = mx.load("one.safetensors")["0.0"].shape[2]
    print(f"{tokens} tokens: {slots} slots, {sizes[tokens]} bytes")
assert abs(sizes[1] - sizes[256]) < 64 and sizes[257] > 1.9 * sizes[256], sizes

cache = filled(200)
told = cache[0].keys[..., 1:200, :]
trim_prompt_cache(cache, 199)
save_prompt_cache("trimmed.safetensors", cache)
read = load_prompt_cache("trimmed.safetensors")[0]
kept = mx.array_equal(read.keys[..., 1:200, :], told)
print(f"200 tokens trimmed to {read.offset}: the other 199 are in the file: {kept}")
assert read.offset == 1 and kept
PY
