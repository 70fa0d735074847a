#!/usr/bin/env bash
# transformers 5.17.0 with tokenizers 0.23.2, Python 3.11, Linux x86-64.
#
# AutoTokenizer tells that a tokenizer in a local folder has "an incorrect regex pattern" and that one should set
# fix_mistral_regex=True, for any model of more than 100,000 tokens whose config.json has no transformers_version: the
# model_type, here qwen2, is not looked at. Who follows the advice gets Mistral's pre-tokenizer in place of the
# model's own, and so other ids. With "transformers_version": "4.50.0" in the same config.json there is no warning and
# the option does nothing.
#
# Seen (Qwen2Tokenizer, byte-level BPE of one merge, "o" with "W"; the text is "HelloWorld"):
#   no version: warns; ['H', 'e', 'l', 'l', 'oW', 'o', 'r', 'l', 'd']
#   no version, fix_mistral_regex=True: ['H', 'e', 'l', 'l', 'o', 'W', 'o', 'r', 'l', 'd']
#   4.50.0: quiet; with and without the option ['H', 'e', 'l', 'l', 'oW', 'o', 'r', 'l', 'd']
#
# Why it matters: folders that were converted from other formats (GGUF) or written by hand have no transformers_version;
# the ids that a fixed tokenizer gives are not those that the model was trained on.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export HF_HUB_OFFLINE=1
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check transformers==5.17.0 tokenizers==0.23.2
venv/bin/python - <<'PY'
import json
import logging
import os

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer
from transformers.utils import logging as told

vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
vocab["oW"] = len(vocab)
for number in range(100_200):
    vocab[f"filler{number}"] = len(vocab)
built = Tokenizer(models.BPE(vocab=vocab, merges=[("o", "W")]))
built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
built.decoder = decoders.ByteLevel()


def folder(name, **more):
    os.makedirs(name)
    built.save(f"{name}/tokenizer.json")
    config = {"model_type": "qwen2", "vocab_size": len(vocab), **more}
    json.dump(config, open(f"{name}/config.json", "w"))
    json.dump({"tokenizer_class": "Qwen2Tokenizer"}, open(f"{name}/tokenizer_config.json", "w"))
    return name


heard = []
handler = logging.Handler()
handler.emit = lambda record: heard.append(record.getMessage())
told.get_logger("transformers").addHandler(handler)


def load(name, **options):
    heard.clear()
    tokens = AutoTokenizer.from_pretrained(name, **options).tokenize("HelloWorld")
    warned = any("incorrect regex" in message for message in heard)
    print(name, options, "warns" if warned else "quiet", tokens)
    return warned, tokens


own = ["H", "e", "l", "l", "oW", "o", "r", "l", "d"]
other = ["H", "e", "l", "l", "o", "W", "o", "r", "l", "d"]
silent, old = folder("no-version"), folder("version", transformers_version="4.50.0")
assert load(silent) == (True, own)
assert load(silent, fix_mistral_regex=True) == (False, other)
assert load(old) == (False, own)
assert load(old, fix_mistral_regex=True) == (False, own)
PY
echo "as described"
