"""Hugging Face tokenizers alone: the tokens of every document with their offsets, nothing cut, nothing written.

    python tokenizers_offsets.py --tokenizer tokenizer.json INPUT.jsonl FOLDER

``encode_batch`` works out the offsets; they are not even turned into Python objects here, which would cost more.
"""

import argparse
from pathlib import Path

import orjson
from tokenizers import Tokenizer

GROUP_CHARS = 1 << 20
"""Text given to the tokenizer in one call."""


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(arguments.tokenizer)
    num_tokens = num_chars = 0
    group: list[str] = []

    def encode() -> int:
        return sum(len(encoding) for encoding in tokenizer.encode_batch(group, add_special_tokens=False))

    with arguments.source.open("rb") as lines:
        for line in lines:
            group.append(orjson.loads(line)["text"])
            num_chars += len(group[-1])
            if num_chars >= GROUP_CHARS:
                num_tokens += encode()
                group, num_chars = [], 0
    num_tokens += encode()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    (arguments.folder / "num_tokens.txt").write_text(f"{num_tokens}\n")


if __name__ == "__main__":
    main()
