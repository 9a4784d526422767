"""Names by content: equal content has an equal id on every machine and in every run.

All ids are 128-bit BLAKE2b digests as 32 hexadecimal characters, so that they read the same in SQL, in file names and
on the command line, and sort the same as bytes and as text.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

ID_LENGTH = 32
"""Characters in an id."""


def hash_bytes(content: bytes) -> str:
    """Returns the id of a byte string."""
    return hashlib.blake2b(content, digest_size=ID_LENGTH // 2).hexdigest()


def hash_json(value: Any) -> str:
    """Returns the id of a JSON value, whatever the order of its keys."""
    return hash_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def make_ref_id(token_ids: Sequence[int] | np.ndarray, tokenizer_id: str) -> str:
    """Returns the id of a reference: a hash of its token ids and of the tokenizer that made them.

    Args:
        token_ids: the reference's tokens without special tokens, each in [0, 2**31).
        tokenizer_id: the id of the tokenizer, see :class:`schemas.protocols.TextTokenizer`.
    """
    tokens = np.ascontiguousarray(token_ids, dtype="<i4")
    if not np.array_equal(tokens, token_ids):
        raise ValueError("a token id is outside [0, 2**31)")
    return hash_bytes(tokenizer_id.encode() + b"\0" + tokens.tobytes())
