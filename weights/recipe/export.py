"""Put a trained checkpoint into the folder that mlx_lm.load reads, with its config.json.

python weights/recipe/export.py CHECKPOINT.safetensors weights/tiny
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path, help="where the tokenizer's files are")
    args = parser.parse_args()
    from model import CONFIG  # which needs PyTorch

    generation = json.loads((args.folder / "generation_config.json").read_text())
    config = {**CONFIG, "eos_token_id": generation["eos_token_id"], "pad_token_id": generation["pad_token_id"]}
    (args.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(args.checkpoint, args.folder / "model.safetensors")


if __name__ == "__main__":
    main()
