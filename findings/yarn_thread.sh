#!/usr/bin/env bash
# mlx-lm 0.32.2 with mlx 0.32.4 (mlx[cpu]), transformers 5.24.0, tokenizers 0.23.3, Python 3.11, Linux x86-64.
#
# A model that mlx_lm.load read in one thread generates in another, unless its RoPE is scaled (here: yarn). load
# evaluates model.parameters(), but the frequencies of a scaled RoPE sit in an attribute that begins with "_",
# which is no parameter: they stay an unfinished computation of the thread that loaded, and MLX's streams belong
# to threads. mx.eval of the "_freqs" in the thread that loaded cures it.
#
# Seen:
#   plain RoPE, in another thread: generates
#   yarn, in another thread: RuntimeError: There is no Stream(cpu, 0) in current thread.
#   yarn, in another thread after mx.eval of _freqs: generates
#
# Why it matters: a server or a chat window that loads a model first and answers in worker threads works with
# every model it was tried with, and fails on the first long-context variant of one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export HF_HUB_OFFLINE=1
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' \
    mlx-lm==0.32.2 transformers==5.24.0 tokenizers==0.23.3
venv/bin/python - <<'PY'
import json
import os
import sys
import threading

import mlx.core as mx
from mlx_lm import generate, load
from mlx_lm.models import qwen3
from mlx_lm.utils import save_config, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

mx.set_default_device(mx.cpu)
config = dict(
    model_type="qwen3", hidden_size=64, num_hidden_layers=2, intermediate_size=64, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, rms_norm_eps=1e-6, vocab_size=300, max_position_embeddings=4096,
    rope_theta=10000.0, tie_word_embeddings=True,
)
yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


def build(folder, **more):
    save_model(folder, qwen3.Model(qwen3.ModelArgs.from_dict({**config, **more})))
    save_config({**config, **more}, f"{folder}/config.json")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(f"{folder}/tokenizer.json")
    with open(f"{folder}/tokenizer_config.json", "w") as f:
        json.dump({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}, f)


def in_thread(model, tokenizer):
    said = []

    def answer():
        try:
            generate(model, tokenizer, "hello", max_tokens=3)
            said.append("generates")
        except RuntimeError as error:
            said.append(f"RuntimeError: {error}")

    thread = threading.Thread(target=answer)
    thread.start()
    thread.join()
    return said[0]


build("plain")
build("yarn", rope_scaling=yarn)
plain = in_thread(*load("plain"))
print("plain RoPE, in another thread:", plain)
model, tokenizer = load("yarn")
scaled = in_thread(model, tokenizer)
print("yarn, in another thread:", scaled)
model, tokenizer = load("yarn")
mx.eval([layer.self_attn.rope._freqs for layer in model.layers])
evaluated = in_thread(model, tokenizer)
print("yarn, in another thread after mx.eval of _freqs:", evaluated)
assert plain == evaluated == "generates"
assert scaled.startswith("RuntimeError: There is no Stream("), scaled
sys.stdout.flush()
os._exit(0)  # without an orderly end: how threads are taken down is another matter
PY
