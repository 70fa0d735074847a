"""Train the byte-level BPE of weights/tiny and turn the books into token files.

    python weights/recipe/tokenizer.py train  --data /work/shared/data --out weights/tiny
    python weights/recipe/tokenizer.py encode --data /work/shared/data --tok weights/tiny --out .gpu

`train` writes tokenizer.json, tokenizer_config.json and generation_config.json; `encode` writes
uint16 token files: books-train.bin, books-heldout.bin and gsm8k-train.bin, in which every book
(every problem) ends with <|endoftext|>.
"""

import argparse
import gzip
import json
from pathlib import Path

VOCAB_SIZE = 4096
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PLAIN = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
# Qwen3's own pattern: digits stand alone, a word takes the space before it.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def books(path):
    """Yield the text of each book in a .jsonl.gz file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def problems(path):
    """Yield GSM8K problems as plain text, question then answer."""
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            item = json.loads(line)
            yield item["question"] + "\n" + item["answer"]


def train(data, out):
    """Train the BPE on every third book and the GSM8K training problems."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL]
        + [AddedToken(t, special=False, normalized=False) for t in PLAIN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts():
        for i, text in enumerate(books(data / "books/books-train.jsonl.gz")):
            if i % 3 == 0:
                yield from text.split("\n\n")
        yield from problems(data / "gsm8k/train.jsonl")

    tokenizer.train_from_iterator(texts(), trainer)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    # The trainer marks every added token as special; only three of them are hidden when decoding.
    saved = json.loads((out / "tokenizer.json").read_text())
    for token in saved["added_tokens"]:
        token["special"] = token["content"] in SPECIAL
    (out / "tokenizer.json").write_text(json.dumps(saved, ensure_ascii=False, indent=None) + "\n")
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 16384,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "bos_token": None,
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
            "added_tokens_decoder": {
                str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in saved["added_tokens"]
            },
            "chat_template": CHAT_TEMPLATE,
        },
    )
    ids = {t["content"]: t["id"] for t in saved["added_tokens"]}
    write_json(
        out / "generation_config.json",
        {
            "do_sample": False,
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "pad_token_id": ids["<|endoftext|>"],
        },
    )


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def encode(data, tok, out):
    """Write the token files that the GPU machine composes its rows from."""
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tok / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    out.mkdir(parents=True, exist_ok=True)
    for name, texts in (
        ("books-train", books(data / "books/books-train.jsonl.gz")),
        ("books-heldout", books(data / "books/books-heldout.jsonl.gz")),
        ("gsm8k-train", problems(data / "gsm8k/train.jsonl")),
    ):
        total = 0
        with open(out / f"{name}.bin", "wb") as file:
            for text in texts:
                ids = tokenizer.encode(text.strip()).ids + [end]
                file.write(np.array(ids, dtype=np.uint16).tobytes())
                total += len(ids)
        print(f"{name}: {total:,} tokens")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["train", "encode"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tok", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.action == "train":
        train(args.data, args.out)
    else:
        encode(args.data, args.tok, args.out)


if __name__ == "__main__":
    main()
