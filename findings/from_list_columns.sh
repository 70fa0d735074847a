#!/usr/bin/env bash
# datasets 5.2.0 with pyarrow 26.0.1, Python 3.11, Linux x86-64.
#
# Dataset.from_list takes the columns from the first row alone: a key that appears first in a later row is gone,
# without a word. from_generator drops it in the same way. The same rows as a JSON lines file keep it.
#
# Seen:
#   from_list: ['text']
#   from_list, rows reversed: ['text', 'tools']
#   from_generator: ['text']
#   JSON lines: ['text', 'tools']
#
# Why it matters: chat rows of which only some have "tools" (or "images", "system") are trained on without
# them, if the first row happens to have none.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export HF_HUB_OFFLINE=1
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1
venv/bin/python - <<'PY'
import json

from datasets import Dataset, disable_progress_bars, load_dataset

disable_progress_bars()
rows = [{"text": "hello"}, {"text": "what is the time?", "tools": ["clock"]}]
with open("rows.jsonl", "w") as f:
    f.writelines(json.dumps(row) + "\n" for row in rows)


def generator():
    yield from rows


seen = {
    "from_list": Dataset.from_list(rows).column_names,
    "from_list, rows reversed": Dataset.from_list(rows[::-1]).column_names,
    "from_generator": Dataset.from_generator(generator, cache_dir="cache").column_names,
    "JSON lines": load_dataset("json", data_files="rows.jsonl", split="train", cache_dir="cache").column_names,
}
for name, columns in seen.items():
    print(f"{name}: {columns}")
assert seen["from_list"] == seen["from_generator"] == ["text"], seen
assert seen["from_list, rows reversed"] == seen["JSON lines"] == ["text", "tools"], seen
PY
