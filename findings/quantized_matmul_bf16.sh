#!/usr/bin/env bash
# mlx 0.32.4 (mlx[cpu]), Python 3.11, Linux x86-64, on the CPU.
#
# mx.quantized_matmul adds its products up in the dtype of its input, the dense matmul of the very same
# numbers does not. In bfloat16 256 + 1 is 256, in float16 2048 + 1 is 2048, so a row of ones times a row of
# ones (8 bits hold a 1 exactly) stops there; the dense product of 4096 ones is 4096 in both.
#
# Seen:
#   bfloat16: quantised 256.0, dense 4096.0
#   float16: quantised 2048.0, dense 4096.0
#   float32: quantised 4096.0, dense 4096.0
#
# Why it matters: a quantised model that runs in bfloat16 on this backend errs by its additions, not by its
# quantised weights; compare it with float32 activations before you blame the bits.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4'
venv/bin/python - <<'PY'
import mlx.core as mx

mx.set_default_device(mx.cpu)
seen = {}
for name in ("bfloat16", "float16", "float32"):
    ones = mx.ones((1, 4096), getattr(mx, name))
    packed = mx.quantize(ones, group_size=64, bits=8)
    assert mx.array_equal(mx.dequantize(*packed, group_size=64, bits=8), ones)
    quantised = mx.quantized_matmul(ones, *packed, transpose=True, group_size=64, bits=8)
    seen[name] = (quantised.item(), (ones @ ones.T).item())
    print(f"{name}: quantised {seen[name][0]}, dense {seen[name][1]}")
assert seen == {"bfloat16": (256, 4096), "float16": (2048, 4096), "float32": (4096, 4096)}, seen
PY
