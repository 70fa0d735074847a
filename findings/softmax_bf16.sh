#!/usr/bin/env bash
# mlx 0.32.4 (mlx[cpu]), Python 3.11, Linux x86-64, on the CPU.
#
# mx.softmax of bfloat16 or float16 adds the exponentials up in that dtype. The sum of more than 256 (float16:
# 2048) like terms stands still, so the probabilities add up to far more than 1: to 125 over 32000 equal
# logits. precise=True, mx.logsumexp and the sum in mx.fast.scaled_dot_product_attention are not affected.
#
# Seen (the sum of softmax over n equal logits, added up in float32; then precise=True):
#   bfloat16, n = 256: 1.0, precise 1
#   bfloat16, n = 512: 2.0, precise 1
#   bfloat16, n = 32000: 125.0, precise 0.999451
#   float16, n = 32000: 15.625, precise 0.999451
#   bfloat16, 4096 logits of a normal distribution: 2.2703
#   bfloat16, attention over 4096 equal keys with values of 1: 1.0
#
# Why it matters: hand-written attention, a router or a sampler over a model's bfloat16 logits gets weights
# that are no distribution, and nothing says so; pass precise=True or cast first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4'
venv/bin/python - <<'PY'
import mlx.core as mx

mx.set_default_device(mx.cpu)


def total(logits, **how):
    return mx.softmax(logits, axis=-1, **how).astype(mx.float32).sum().item()


seen = {}
for dtype, n in ((mx.bfloat16, 256), (mx.bfloat16, 512), (mx.bfloat16, 32000), (mx.float16, 32000)):
    logits = mx.zeros((n,), dtype)
    plain, precise = total(logits), total(logits, precise=True)
    print(f"{str(dtype).split('.')[-1]}, n = {n}: {plain}, precise {precise:.6g}")
    assert abs(precise - 1) < 0.01, precise
    seen[str(dtype).split(".")[-1], n] = plain
assert seen == {
    ("bfloat16", 256): 1.0, ("bfloat16", 512): 2.0, ("bfloat16", 32000): 125.0, ("float16", 32000): 15.625
}, seen

logits = mx.random.normal((4096,), key=mx.random.key(0)).astype(mx.bfloat16)
print(f"bfloat16, 4096 logits of a normal distribution: {total(logits):.5g}")
assert total(logits) > 2
assert abs(mx.logsumexp(mx.zeros((4096,), mx.bfloat16)).item() - 8.3178) < 0.05

query, keys = mx.zeros((1, 1, 1, 64), mx.bfloat16), mx.zeros((1, 1, 4096, 64), mx.bfloat16)
mixed = mx.fast.scaled_dot_product_attention(query, keys, keys + 1, scale=1.0)
print("bfloat16, attention over 4096 equal keys with values of 1:", mixed[0, 0, 0, 0].item())
assert mixed[0, 0, 0, 0].item() == 1.0
PY
