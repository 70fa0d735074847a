#!/usr/bin/env bash
# mlx-lm 0.32.2 with mlx 0.32.4 (mlx[cpu]), transformers 5.24.0, datasets 5.2.0, Python 3.11, Linux x86-64.
#
# mlx_lm.perplexity --num-samples -1 ("all available") fails with an IndexError on every data set: it goes on
# reading rows until it has more tokens than infinity. So does any number of samples that the data does not fill.
#
# Seen (20 short texts, samples of 32 tokens):
#   --num-samples 4: Perplexity
#   --num-samples -1: IndexError: list index out of range
#   --num-samples 256: IndexError: list index out of range
#
# Why it matters: the perplexity of a whole file can be had only with the number of its samples counted
# beforehand, and the default of 256 samples of 512 tokens fails on every small test set.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export HF_HUB_OFFLINE=1
python3 -m venv venv
export HF_HOME="$folder/home"
venv/bin/python -m pip install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' \
    mlx-lm==0.32.2 transformers==5.24.0 tokenizers==0.23.3 datasets==5.2.0
venv/bin/python - <<'PY'
import json
import os
import subprocess
import sys

import mlx.core as mx
from mlx_lm.models import qwen3
from mlx_lm.utils import save_config, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

mx.set_default_device(mx.cpu)
config = dict(
    model_type="qwen3", hidden_size=64, num_hidden_layers=1, intermediate_size=64, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, rms_norm_eps=1e-6, vocab_size=300, max_position_embeddings=512,
    rope_theta=10000.0, tie_word_embeddings=True,
)
save_model("model", qwen3.Model(qwen3.ModelArgs.from_dict(config)))
save_config(dict(config), "model/config.json")
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_special_tokens(["<|end|>"])
tokenizer.save("model/tokenizer.json")
with open("model/tokenizer_config.json", "w") as f:
    json.dump({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}, f)
os.mkdir("texts")
with open("texts/train.jsonl", "w") as f:
    f.writelines(json.dumps({"text": f"the text of number {i:02}"}) + "\n" for i in range(20))

seen = {}
for samples in ("4", "-1", "256"):
    ran = subprocess.run(
        [sys.executable, "-m", "mlx_lm", "perplexity", "--model", "model", "--data-path", "texts",
         "--sequence-length", "32", "--num-samples", samples], capture_output=True, text=True,
    )
    said = ran.stderr if ran.returncode else next(l for l in ran.stdout.splitlines() if "Perplexity:" in l)
    seen[samples] = said.strip().splitlines()[-1]
    print(f"--num-samples {samples}: {seen[samples].split(':')[0] if not ran.returncode else seen[samples]}")
assert seen["4"].startswith("Perplexity:")
assert seen["-1"] == seen["256"] == "IndexError: list index out of range", seen
PY
