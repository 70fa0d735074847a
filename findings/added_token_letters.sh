#!/usr/bin/env bash
# tokenizers 0.23.3, Python 3.11, Linux x86-64.
#
# In a byte-level BPE tokenizer a token added with add_tokens does not survive encode and decode if it has letters
# such as ö, ß or ï and all of its letters are in the byte alphabet: the decoder takes each for the byte that it
# stands for. Before the word is added it comes back whole, and so do added words with a letter from outside.
#
# Seen:
#   größe: before größe, after add_tokens 'gr\ufffd\ufffde'
#   naïve: before naïve, after add_tokens 'na\ufffdve'
#   señor: before señor, after add_tokens 'se\ufffdor'
#   Łódź: before Łódź, after add_tokens '\u0141\xf3d\u017a'
#   東京: before 東京, after add_tokens '\u6771\u4eac'
#
# Why it matters: adding a field's own words to a Qwen, Llama 3 or GPT-2 vocabulary makes German, French or
# Spanish text worse than leaving them out, and nothing raises; check decode(encode(word)) == word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export HF_HUB_OFFLINE=1
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check tokenizers==0.23.3
venv/bin/python - <<'PY'
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()


def again(text):
    return tokenizer.decode(tokenizer.encode(text).ids)


broken = []
for word in ("größe", "naïve", "señor", "Łódź", "東京"):
    before = again(word)
    tokenizer.add_tokens([word])
    after = again(word)
    print(f"{word}: before {before}, after add_tokens {after!a}")
    assert before == word
    if after != word:
        assert "\ufffd" in after
        broken.append(word)
assert broken == ["größe", "naïve", "señor"], broken
PY
