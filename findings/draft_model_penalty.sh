#!/usr/bin/env bash
# mlx-lm 0.32.2 with mlx 0.32.4 (mlx[cpu]), transformers 5.24.0, Python 3.11, Linux x86-64.
#
# Logits processors of mlx-lm see the whole prompt, unless a draft model is given: then they see its last token
# alone. A repetition penalty so answers to other tokens with speculative decoding than without, and greedy
# decoding gives another text even where the draft model is the model itself.
#
# Seen (a random model, a penalty so high that no token of the last 20 comes again):
#   alone, penalty None: first sees [3, 5, 7, 9, 11, 13, 15, 17], says [17, 17, 17, 17, 17, 17]
#   with a draft, penalty None: first sees [17], says [17, 17, 17, 17, 17, 17]
#   alone, penalty 1000000000.0: first sees [3, 5, 7, 9, 11, 13, 15, 17], says [23, 14, 12, 1, 10, 6]
#   with a draft, penalty 1000000000.0: first sees [17], says [23, 14, 12, 13, 3, 4]
#
# Why it matters: speculative decoding is taken for a change of speed only; every processor that looks back at
# the prompt (penalties, a grammar that begins there, no-repeat rules) quietly does something else with it.
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
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import qwen3
from mlx_lm.sample_utils import make_logits_processors

mx.set_default_device(mx.cpu)
mx.random.seed(0)
model = qwen3.Model(qwen3.ModelArgs.from_dict(dict(
    model_type="qwen3", hidden_size=64, num_hidden_layers=2, intermediate_size=64, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, rms_norm_eps=1e-6, vocab_size=24, max_position_embeddings=512,
    rope_theta=10000.0, tie_word_embeddings=True,
)))
prompt = mx.array([3, 5, 7, 9, 11, 13, 15, 17])


def answer(name, *processors):
    first = []

    def spy(tokens, logits):
        first.append(tokens.tolist())
        return logits

    how = dict(max_tokens=6, logits_processors=[spy, *processors])
    if name == "alone":
        steps = generate_step(prompt, model, **how)
    else:
        steps = speculative_generate_step(prompt, model, model, **how)
    return [step[0] for step in steps], first[0]


seen = {}
for penalty in (None, 1e9):
    for name in ("alone", "with a draft"):
        said, first = answer(name, *make_logits_processors(repetition_penalty=penalty))
        seen[penalty, name] = said
        print(f"{name}, penalty {penalty}: first sees {first}, says {said}")
        assert first == (prompt.tolist() if name == "alone" else prompt.tolist()[-1:])
assert seen[None, "alone"] == seen[None, "with a draft"]
assert not set(seen[1e9, "alone"]) & set(prompt.tolist())
assert set(seen[1e9, "with a draft"]) & set(prompt.tolist())
PY
