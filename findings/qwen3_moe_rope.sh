#!/usr/bin/env bash
# mlx-lm 0.32.2 with mlx 0.32.4 (mlx[cpu]), transformers 5.24.0, Python 3.11, Linux x86-64.
#
# mlx-lm's qwen3_moe takes rope_scaling from a config and does not use it: a Qwen3-MoE model with yarn computes
# the same as one without, to the bit. The dense qwen3 of the same release does scale, and reads the
# rope_parameters that transformers 5 writes; qwen3_moe refuses a config with those names (rope_parameters,
# num_local_experts).
#
# Seen:
#   qwen3: yarn changes the logits by at most 1.88
#   qwen3_moe: yarn changes the logits by at most 0
#   qwen3, a config of transformers 5: rope_theta 10000.0
#   qwen3_moe, a config of transformers 5: missing 2 required positional arguments: 'num_experts' and 'rope_theta'
#
# Why it matters: the YaRN settings that Qwen3-30B-A3B and its like document for 131,072 tokens are taken
# without a word and change nothing; beyond the trained length the model is read at positions it never saw.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' \
    mlx-lm==0.32.2 transformers==5.24.0 tokenizers==0.23.3
venv/bin/python - <<'PY'
import json

import mlx.core as mx
from mlx_lm.models import qwen3, qwen3_moe
from transformers import Qwen3Config, Qwen3MoeConfig

mx.set_default_device(mx.cpu)
common = dict(
    hidden_size=64, num_hidden_layers=2, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1,
    head_dim=32, rms_norm_eps=1e-6, vocab_size=300, max_position_embeddings=4096, tie_word_embeddings=True,
)
experts = dict(
    num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1, mlp_only_layers=[], moe_intermediate_size=32,
    norm_topk_prob=True,
)
yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


def logits(module, **more):
    mx.random.seed(0)
    config = dict(model_type="any", rope_theta=10000.0, **common, **experts)
    return module.Model(module.ModelArgs.from_dict({**config, **more}))(mx.arange(100)[None])


change = {}
for module in (qwen3, qwen3_moe):
    name = module.__name__.split(".")[-1]
    change[name] = mx.abs(logits(module) - logits(module, rope_scaling=yarn)).max().item()
    print(f"{name}: yarn changes the logits by at most {change[name]:.3g}")
assert change["qwen3_moe"] == 0 and change["qwen3"] > 0.01, change

for module, written in (
    (qwen3, Qwen3Config(**common)),
    (qwen3_moe, Qwen3MoeConfig(**common, **experts)),
):
    name = module.__name__.split(".")[-1]
    config = json.loads(written.to_json_string(use_diff=False))
    try:
        said = f"rope_theta {module.ModelArgs.from_dict(config).rope_theta}"
    except TypeError as error:
        said = str(error).removeprefix("ModelArgs.__init__() ")
    print(f"{name}, a config of transformers 5: {said}")
    assert ("'rope_theta'" in said) == (name == "qwen3_moe"), said
PY
