#!/usr/bin/env bash
# usearch 2.26.6, numpy 2.2.6, Python 3.11, Linux x86-64.
#
# A batch search that finds fewer entries than were asked for fills the rest of each row of `keys` with 0, which is a key
# like any other, and of `distances` with nan. Only `counts` says where a row ends. A search for one vector returns a
# shorter row in place of that.
#
# Seen (an index of two entries, keys 1 and 2, asked for 5):
#   keys [[2, 1, 0, 0, 0], [2, 1, 0, 0, 0]] counts [2, 2]
#   one query [2, 1]
#
# Why it matters: whoever looks entries up by `keys` alone, or computes recall from them, takes entry 0 for found.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check usearch==2.26.6 numpy==2.2.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
from usearch.index import Index

index = Index(ndim=4, metric="ip", dtype="f32")
vectors = np.array([[1, 0, 0, 0], [1, 1, 0, 0]], np.float32)
index.add(np.array([1, 2], np.uint64), vectors)  # no entry has key 0
many = index.search(np.array([[1, 1, 0, 0], [0, 0, 1, 1]], np.float32), 5)
one = index.search(np.array([1, 1, 0, 0], np.float32), 5)
print("keys", many.keys.tolist(), "counts", many.counts.tolist(), "distances", many.distances.tolist())
print("one query", one.keys.tolist())
assert many.counts.tolist() == [2, 2] and many.keys.shape == (2, 5)
assert (many.keys[:, 2:] == 0).all() and np.isnan(many.distances[:, 2:]).all()
assert len(one.keys) == 2 and 0 not in one.keys
PYTHON
