#!/usr/bin/env bash
# mlx-lm 0.32.2 with mlx 0.32.4 (mlx[cpu]), transformers 5.24.0, Python 3.11, Linux x86-64.
#
# The streaming detokenizers of byte-level and SentencePiece vocabularies take one space off the beginning of what
# they are given. What generate returns (and what mlx-lm's server, which has the same detokenizers, answers at
# /v1/completions) therefore does not begin with the space that the model wrote, also where a prompt is to be continued.
#
# Seen (a model that is made to say " def" after "abc"):
#   tokens [26, 3, 4, 5] are ' def' by decode and 'def' by generate (BPEStreamingDetokenizer)
#   prompt and text: 'abcdef', which has 6 tokens of 7
#
# Why it matters: prompt + completion is another text than the model's, with two words run together; read again as a
# prompt it has other tokens, and editors that complete what stands before the cursor lose the space.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export HF_HUB_OFFLINE=1
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' \
    mlx-lm==0.32.2 transformers==5.24.0 tokenizers==0.23.3
venv/bin/python - <<'PY'
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from mlx_lm import generate
from mlx_lm.models import qwen3
from mlx_lm.tokenizer_utils import load as load_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

mx.set_default_device(mx.cpu)
print(*(f"{name} {version(name)}" for name in ("mlx", "mlx-lm", "transformers")), sep=", ")
letters = [*"abcdefghijklmnopqrstuvwxyz", "Ġ"]  # the last one stands for a space
made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)} | {"<end>": 27}, []))
made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>").save_pretrained("tokenizer")
tokenizer = load_tokenizer(Path("tokenizer"))
model = qwen3.Model(qwen3.ModelArgs.from_dict(dict(
    model_type="qwen3", hidden_size=64, num_hidden_layers=1, intermediate_size=64, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, rms_norm_eps=1e-6, vocab_size=28, max_position_embeddings=512,
    rope_theta=10000.0, tie_word_embeddings=True,
)))
prompt, wanted = tokenizer.encode("abc"), tokenizer.encode(" def")


def say(tokens, logits):
    at = len(tokens) - len(prompt)
    return mx.where(mx.arange(28) == (wanted[at] if at < len(wanted) else 27), 0.0, -1e9) + 0 * logits


text = generate(model, tokenizer, prompt, max_tokens=8, logits_processors=[say])
decoded = tokenizer.decode(wanted)
print(f"tokens {wanted} are {decoded!r} by decode and {text!r} by generate ({type(tokenizer.detokenizer).__name__})")
print(f"prompt and text: {'abc' + text!r}, which has {len(tokenizer.encode('abc' + text))} tokens of {len(prompt + wanted)}")
assert decoded == " def" and text == "def"
PY
