"""A checkpoint's tokenizer as the pipelines use it: plain text only, special tokens never recognised in it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from model.locating import find_checkpoint
from schemas.errors import InputError
from schemas.identifiers import hash_json
from schemas.protocols import IntArray


class CheckpointTokenizer:
    """A fast tokenizer of Hugging Face without special tokens; a :class:`schemas.protocols.TextTokenizer`.

    A text that spells a special token, for instance ``</s>``, is tokenized as the text it is: a corpus must not be able
    to end a sequence.
    """

    def __init__(self, tokenizer: Tokenizer, definition: dict[str, Any] | None = None) -> None:
        """Takes a tokenizer and switches off truncation, padding and special tokens.

        Args:
            tokenizer: the tokenizer.
            definition: the contents of its file; by default what the library would write today.
        """
        parts = json.loads(tokenizer.to_str()) if definition is None else definition
        self._id = hash_json({name: part for name, part in parts.items() if name not in ("truncation", "padding")})
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer

    @property
    def tokenizer_id(self) -> str:
        """Hash of everything in ``tokenizer.json`` but truncation and padding."""
        return self._id

    def encode(self, texts: Sequence[str]) -> list[IntArray]:
        """Returns the token ids of each text."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def encode_with_spans(self, texts: Sequence[str]) -> list[tuple[IntArray, IntArray]]:
        """Returns token ids (tokens,) and character spans (tokens, 2) of each text."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [
            (np.asarray(encoding.ids, dtype=np.int32), np.asarray(encoding.offsets, dtype=np.int32).reshape(-1, 2))
            for encoding in encodings
        ]

    def decode(self, token_ids: Sequence[int] | IntArray) -> str:
        """Returns the text of tokens; special tokens are left out, and cut letters become U+FFFD."""
        return str(self._tokenizer.decode([int(token) for token in token_ids], skip_special_tokens=True))


def load_tokenizer(checkpoint: str | Path) -> CheckpointTokenizer:
    """Loads the tokenizer of a checkpoint, by name or folder.

    Raises:
        InputError: the folder has no ``tokenizer.json``, or a damaged one.
    """
    path = find_checkpoint(str(checkpoint)) / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{checkpoint} has no tokenizer.json; give the folder of a model with a fast tokenizer")
    try:
        text = path.read_text(encoding="utf-8")
        return CheckpointTokenizer(Tokenizer.from_str(text), json.loads(text))
    except Exception as error:  # the library raises nothing more specific
        raise InputError(f"{path} is no tokenizer this release can load: {error}") from error
