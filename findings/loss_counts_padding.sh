#!/usr/bin/env bash
# mlx-lm 0.32.2 with mlx 0.32.4 (mlx[cpu]), transformers 5.24.0, Python 3.11, Linux x86-64.
#
# The loss that mlx_lm.lora trains and validates with counts one padding token a row: a row of n tokens has n - 1
# to predict and is counted with n. The extra one is the zero of the padding, predicted from the row's last token
# (as a rule the end of text). Rows as long as their batch have no such place and are counted right.
#
# Seen (a model to which all ten tokens are alike, but token 0 next to impossible after the end of text):
#   padded: 5 tokens to predict, 6 counted, loss 18.952
#   as long as its batch: 5 tokens to predict, 5 counted, loss 2.303
#
# Why it matters: reported losses are off, most for short answers with --mask-prompt, and an adapter learns to
# say token 0 ("!" in Qwen's vocabulary) after the end of text, which shows once that token is not a stop.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export HF_HUB_OFFLINE=1
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' \
    mlx-lm==0.32.2 transformers==5.24.0 tokenizers==0.23.3
venv/bin/python - <<'PY'
import mlx.core as mx
from mlx_lm.tuner.trainer import default_loss, iterate_batches

mx.set_default_device(mx.cpu)
END = 9
row = [1, 1, 1, 1, 1, END]


def model(tokens):
    """All of ten tokens alike, but after the end of text token 0 next to impossible."""
    logits = mx.zeros((*tokens.shape, 10))
    return mx.where((tokens == END)[..., None] & (mx.arange(10) == 0), -100.0, logits)


seen = []
for name, longest in (("padded", 2048), ("as long as its batch", len(row))):
    batch, lengths = next(iterate_batches([(row, 0)], 1, longest))
    loss, counted = default_loss(model, batch, lengths)
    seen.append((counted.item(), round(loss.item(), 3)))
    print(f"{name}: {len(row) - 1} tokens to predict, {counted.item()} counted, loss {loss.item():.3f}")
assert seen == [(6, 18.952), (5, 2.303)], seen
PY
