#!/usr/bin/env bash
# mlx-lm 0.32.2 with mlx 0.32.4 (mlx[cpu]), transformers 5.24.0, Python 3.11, Linux x86-64.
#
# mlx-lm's iterate_batches sorts texts by length so that a batch holds like lengths, but for the dataset class that
# mlx_lm.lora uses (CacheDataset) the length of a row is len() of its JSON object: the number of its keys. Rows
# with the same keys stay in the order of the file, so long and short ones share a batch, always the same ones,
# and what does not fill a batch is left out of training and validation: the last rows of the file.
#
# Seen (lengths in tokens of each batch of two; seven texts in the file):
#   CacheDataset: [[80, 4], [90, 2], [100, 3]], left out [70]
#   list of rows: [[2, 3], [4, 70], [80, 90]], left out [100]
#
# Why it matters: most of a batch can be padding, and the end of a small validation file is never looked at, not
# even with val_batches = -1 ("the entire validation set"); sort the file by length and fill the last batch.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export HF_HUB_OFFLINE=1
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' \
    mlx-lm==0.32.2 transformers==5.24.0 tokenizers==0.23.3
venv/bin/python - <<'PY'
from mlx_lm.tuner.datasets import CacheDataset, TextDataset
from mlx_lm.tuner.trainer import iterate_batches


class Letters:
    eos_token_id = 1

    def encode(self, text):
        return [2 for _ in text]


lengths = (100, 3, 90, 2, 80, 4, 70)
texts = [{"text": "a" * (n - 1)} for n in lengths]
rows = [([2] * n, 0) for n in lengths]
seen = {}
for name, data in (("CacheDataset", CacheDataset(TextDataset(texts, Letters()))), ("list of rows", rows)):
    batches = [[length for _, length in marks.tolist()] for _, marks in iterate_batches(data, 2, 2048)]
    seen[name] = sorted(batches)
    left = sorted(set(lengths) - {length for batch in batches for length in batch})
    print(f"{name}: {seen[name]}, left out {left}")
assert seen["CacheDataset"] == [[80, 4], [90, 2], [100, 3]], seen
assert seen["list of rows"] == [[2, 3], [4, 70], [80, 90]], seen
PY
