#!/usr/bin/env bash
# mlx 0.32.4 (mlx[cpu]), Python 3.11, Linux x86-64, on the CPU.
#
# A query that may attend to no key at all gets two different answers from mx.fast.scaled_dot_product_attention,
# by how the mask is written: with a boolean mask the mean of all values, masked as they are; with the same mask
# as 0 and -inf, nan.
#
# Seen (the first number of the output, for a row with no key):
#   boolean mask: 0.4648
#   mask of 0 and -inf: nan
#   mean of all values: 0.4648
#
# Why it matters: padded rows, sliding windows and pruned caches have such rows; with booleans they leak every
# value into the output without a nan to be found by.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export HF_HUB_OFFLINE=1
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4'
venv/bin/python - <<'PY'
import math

import mlx.core as mx

mx.set_default_device(mx.cpu)
query, keys, values = (mx.random.normal((1, 1, n, 32), key=mx.random.key(n)) for n in (2, 3, 4))
values = values[:, :, :3]
allowed = mx.array([[False, False, False], [True, False, True]])


def attend(mask):
    return mx.fast.scaled_dot_product_attention(query, keys, values, scale=1.0, mask=mask)[0, 0]


boolean, added = attend(allowed), attend(mx.where(allowed, 0.0, -mx.inf))
mean = values.mean(axis=2)[0, 0]
print(f"boolean mask: {boolean[0, 0].item():.4f}")
print(f"mask of 0 and -inf: {abs(added[0, 0].item()):.4f}")
print(f"mean of all values: {mean[0].item():.4f}")
assert mx.allclose(boolean[0], mean, atol=1e-5)
assert math.isnan(added[0, 0].item())
assert mx.allclose(boolean[1], added[1], atol=1e-5)
PY
