#!/usr/bin/env bash
# mlx-lm 0.32.2 with mlx 0.32.4 (mlx[cpu]), transformers 5.24.0, openai 3.57.0, Python 3.11, Linux x86-64.
#
# With top_logprobs mlx-lm's server gives, as each token of the answer and its log-probability, not the token that
# was sampled but one of the likeliest, and of these the first of a partition, which is in no order. Without
# top_logprobs an item has an id and no token, so the openai package, which takes items as they come, has None
# where its type says str. A stream has no log-probabilities at all.
#
# Seen (a random model over 26 letters, 40 tokens, top_logprobs 5):
#   temperature 1.0: the answer   llllllllzexxllllllllllllllllllllllddrree
#                    its logprobs lxyxxxyxxllmmxxxxxxxxxxxxxxxxxxxxxxlqbbf
#     equal in 1 of 40 places; another of the five is likelier in 40
#   temperature 0.0: the answer   oooooooooooooooooooooooooooooooooooooooo
#                    its logprobs lllllqqqlyywliliwwwwwiwwiiyiyllllillilxi
#     equal in 0 of 40 places; another of the five is likelier in 40
#   without top_logprobs: token None, a str by its type; in a stream: None
#
# Why it matters: the log-probability of an answer, added up over such items, is that of another text, unless
# the answer is greedy and top_logprobs is 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$folder"' EXIT
cd "$folder"
export HF_HUB_OFFLINE=1
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' \
    mlx-lm==0.32.2 transformers==5.24.0 tokenizers==0.23.3 openai==3.57.0
venv/bin/python - <<'PY'
import json
import os

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

mx.set_default_device(mx.cpu)
mx.random.seed(0)
config = dict(
    model_type="qwen3", hidden_size=64, num_hidden_layers=1, intermediate_size=64, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, rms_norm_eps=1e-6, vocab_size=28, max_position_embeddings=512,
    rope_theta=10000.0, tie_word_embeddings=True, eos_token_id=27,
)
model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
os.mkdir("model")
mx.save_safetensors("model/model.safetensors", dict(tree_flatten(model.parameters())), {"format": "mlx"})
json.dump(config, open("model/config.json", "w"))
letters = [*"abcdefghijklmnopqrstuvwxyz", "Ġ"]  # the last one stands for a space
tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)} | {"<end>": 27}, []))
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
fast.chat_template = "{{ messages[0]['content'] }}"
fast.save_pretrained("model")
PY
port=$(venv/bin/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
venv/bin/python -m mlx_lm.server --model ./model --port "$port" >server.log 2>&1 &
venv/bin/python - "$port" <<'PY'
import sys
import time
from importlib.metadata import version

import openai

client = openai.OpenAI(base_url=f"http://127.0.0.1:{sys.argv[1]}/v1", api_key="none", max_retries=0)
asked = dict(
    model="default_model", messages=[{"role": "user", "content": "hello"}], max_tokens=40, seed=1,
    logit_bias={"27": -100, "26": -100}, logprobs=True,
)


def ask(**more):
    for _ in range(120):
        try:
            return client.chat.completions.create(**asked, **more)
        except openai.APIConnectionError:
            time.sleep(0.5)
    raise SystemExit("the server does not start")


print(*(f"{name} {version(name)}" for name in ("mlx", "mlx-lm", "transformers", "openai")), sep=", ")
for temperature in (1.0, 0.0):
    choice = ask(top_logprobs=5, temperature=temperature).choices[0]
    text, items = choice.message.content, choice.logprobs.content
    told = "".join(item.token for item in items)
    equal = sum(a == b for a, b in zip(text, told))
    unordered = sum(item.logprob < max(top.logprob for top in item.top_logprobs) for item in items)
    print(f"temperature {temperature}: the answer   {text}\n                 its logprobs {told}")
    print(f"  equal in {equal} of {len(text)} places; another of the five is likelier in {unordered}")
    assert len(text) == len(items) == 40 and equal < 20 and unordered > 20

plain = ask().choices[0].logprobs.content[0]
chunks = list(ask(stream=True, top_logprobs=5))
streamed = {str(getattr(c.choices[0], "logprobs", None)) for c in chunks if c.choices}
print(f"without top_logprobs: token {plain.token}, a str by its type; in a stream: {', '.join(streamed)}")
assert plain.token is None and streamed == {"None"}
PY
