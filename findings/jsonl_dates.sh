#!/usr/bin/env bash
# datasets 5.2.0 with pyarrow 26.0.1, Python 3.11, Linux x86-64.
#
# load_dataset("json") turns strings into datetimes where every string of a field looks like a date, also deep
# inside chat messages; an offset from UTC is worked in and lost. One string that is no date keeps all of them
# text. Dataset.from_list of the same rows leaves them text always.
#
# Seen:
#   "2024-05-01" and other dates: datetime.datetime(2024, 5, 1, 0, 0)
#   "2024-05-01T10:00:00+02:00": datetime.datetime(2024, 5, 1, 8, 0)
#   "2024-05-01" beside "in spring": '2024-05-01'
#   "2024-05-01" and other dates, from_list: '2024-05-01'
#
# Why it matters: a question-answering set with dates for answers comes back without one string answer, so
# len(), tokenizing or comparing fails on it, or it trains on "2024-05-01 00:00:00", which no row says.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export HF_HUB_OFFLINE=1
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1
venv/bin/python - <<'PY'
import datetime
import json

from datasets import Dataset, disable_progress_bars, load_dataset

disable_progress_bars()


def read(name, *rows):
    with open(f"{name}.jsonl", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    return load_dataset("json", data_files=f"{name}.jsonl", split="train", cache_dir="cache")


def talk(answer):
    return {"messages": [{"role": "assistant", "content": answer}]}


def answer(rows):
    return rows[0]["messages"][0]["content"]


dates = answer(read("dates", talk("2024-05-01"), talk("1999-12-31")))
offset = answer(read("offset", talk("2024-05-01T10:00:00+02:00")))
mixed = answer(read("mixed", talk("2024-05-01"), talk("in spring")))
plain = answer(Dataset.from_list([talk("2024-05-01"), talk("1999-12-31")]))
print('"2024-05-01" and other dates:', repr(dates))
print('"2024-05-01T10:00:00+02:00":', repr(offset))
print('"2024-05-01" beside "in spring":', repr(mixed))
print('"2024-05-01" and other dates, from_list:', repr(plain))
assert dates == datetime.datetime(2024, 5, 1)
assert offset == datetime.datetime(2024, 5, 1, 8)
assert mixed == plain == "2024-05-01"
PY
