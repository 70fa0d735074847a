#!/usr/bin/env bash
# mlx 0.32.4 (mlx[cpu]), gguf 0.19.0, Python 3.11, Linux x86-64.
#
# mx.load of a GGUF file stops at the first tensor of a type it does not know (MXFP4, TQ2_0) and returns what
# came before it, without an error: the tensors after it are missing too, whatever their type. Types that it
# knows and cannot convert (Q5_0) do raise. gguf's own reader lists all tensors of the file.
#
# Seen:
#   F16, MXFP4, F32, Q8_0 -> ['F16.weight']
#   TQ2_0, F32 -> []
#   F32, F16 -> ['F16.weight', 'F32.weight']
#   F32, Q5_0 -> [load_gguf] gguf_tensor_to_f16 failed
#
# Why it matters: the GGUF files of models released in MXFP4 load as a part of themselves; count the tensors,
# or load_weights(strict=False) leaves the rest of the model as it was initialised.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export HF_HUB_OFFLINE=1
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' gguf==0.19.0
venv/bin/python - <<'PY'
import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Kind

weights = np.random.default_rng(0).normal(size=(4, 256)).astype(np.float32)


def read(*kinds):
    writer = gguf.GGUFWriter("model.gguf", "llama")
    for kind in kinds:
        writer.add_tensor(f"{kind.name}.weight", gguf.quants.quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert len(gguf.GGUFReader("model.gguf").tensors) == len(kinds)
    try:
        said = sorted(mx.load("model.gguf"))
    except RuntimeError as error:
        said = str(error)
    print(", ".join(kind.name for kind in kinds), "->", said)
    return said


assert read(Kind.F16, Kind.MXFP4, Kind.F32, Kind.Q8_0) == ["F16.weight"]
assert read(Kind.TQ2_0, Kind.F32) == []
assert read(Kind.F32, Kind.F16) == ["F16.weight", "F32.weight"]
assert "failed" in read(Kind.F32, Kind.Q5_0)
PY
