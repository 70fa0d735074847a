#!/usr/bin/env bash
# transformers 5.24.0 with tokenizers 0.23.3, Python 3.11, Linux x86-64.
#
# AutoTokenizer does not take a tokenizer.json as it is where tokenizer_config.json names GPT2Tokenizer (or
# Qwen2Tokenizer): of the file it keeps the vocabulary and the merges, and puts the pre-tokenizer and the
# normalizer of the named class in place of the file's own. No warning, and other token ids. Under
# PreTrainedTokenizerFast the same file is obeyed; under LlamaTokenizer it is, with a note.
#
# Seen (the file splits digits and has a normalizer to lower case; the text is "HE 12"):
#   tokenizers: ['he', 'Ġ', '1', '2']
#   PreTrainedTokenizerFast: ['he', 'Ġ', '1', '2'], normalizer Lowercase()
#   GPT2Tokenizer: ['H', 'E', 'Ġ', '12'], normalizer None
#   Qwen2Tokenizer: ['H', 'E', 'Ġ', '1', '2'], normalizer NFC()
#
# Why it matters: a tokenizer trained with `tokenizers` and labelled with the nearest well-known class gives a
# model other ids in transformers and mlx-lm than it was trained on, and than tokenizers itself gives.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export HF_HUB_OFFLINE=1
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check transformers==5.24.0 tokenizers==0.23.3
venv/bin/python - <<'PY'
import json
import os

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
for token in ("he", "12", "Ġ1", "<|end|>"):
    vocab[token] = len(vocab)
built = Tokenizer(models.BPE(vocab=vocab, merges=[("h", "e"), ("1", "2"), ("Ġ", "1")]))
built.normalizer = normalizers.Lowercase()
built.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
built.decoder = decoders.ByteLevel()
text = "HE 12"
expected = built.encode(text).tokens
print("tokenizers:", expected)
seen = {}
for name in ("PreTrainedTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer"):
    os.makedirs(name)
    built.save(f"{name}/tokenizer.json")
    with open(f"{name}/tokenizer_config.json", "w") as f:
        json.dump({"tokenizer_class": name, "eos_token": "<|end|>"}, f)
    loaded = AutoTokenizer.from_pretrained(name)
    seen[name] = loaded.convert_ids_to_tokens(loaded.encode(text))
    print(f"{name}: {seen[name]}, normalizer {loaded.backend_tokenizer.normalizer}")
assert seen["PreTrainedTokenizerFast"] == expected == ["he", "Ġ", "1", "2"]
assert seen["GPT2Tokenizer"] != expected and seen["GPT2Tokenizer"][:2] == ["H", "E"]
assert seen["Qwen2Tokenizer"] != expected and seen["Qwen2Tokenizer"][:2] == ["H", "E"]
PY
