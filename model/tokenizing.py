"""A checkpoint's tokenizer as the pipelines use it: plain text only, special tokens never recognised in it.

Corpora are encoded by kernels where the tokenizer is of a kind they know (:mod:`model.byte_level`) and by the
``tokenizers`` library where it is not; the tokens are the same. The kernels are loaded when a corpus is first encoded:
prompts are short and do without.
"""

import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from model.locating import find_checkpoint
from schemas.errors import InputError
from schemas.identifiers import hash_json
from schemas.protocols import EncodedTexts, IntArray, LongArray, MaskArray

if TYPE_CHECKING:
    from model.byte_level import ByteLevelEncoder

_LOGGER = logging.getLogger(__name__)
_GROUP_CHARS = 1 << 20


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
        self._lock = threading.Lock()
        self._encoder: ByteLevelEncoder | None = None
        self._speed = ""

    @property
    def tokenizer_id(self) -> str:
        """Hash of everything in ``tokenizer.json`` but truncation and padding."""
        return self._id

    def encode(self, texts: Sequence[str]) -> list[IntArray]:
        """Returns the token ids of each text."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def encode_texts(self, texts: pa.Array) -> EncodedTexts:
        """Returns the tokens of an array of strings with where they stand.

        With the kernels, each token covers just its own bytes, the space before a word included. What comes from the
        library covers whole characters, and not the spaces that its post-processor may trim.

        Raises:
            InputError: the array is not of type string or large_string, or has nulls or invalid UTF-8.
        """
        _check_texts(texts)
        encoder = self._find_encoder()
        if encoder is None:
            return _encode_with_library(self._tokenizer, texts)
        exceptions = encoder.find_exceptions(texts)
        if not exceptions.any():
            return encoder.encode(texts)
        return _join_encoded(
            encoder.encode(texts.filter(pa.array(~exceptions))),
            _encode_with_library(self._tokenizer, texts.filter(pa.array(exceptions))),
            exceptions,
        )

    def find_spans(self, text: str) -> list[tuple[int, int]]:
        """Returns the span of each token of one text in characters, by the library: made for showing a text."""
        return [(start, end) for start, end in self._tokenizer.encode(text, add_special_tokens=False).offsets]

    def describe_speed(self) -> str:
        """Says in half a sentence what encodes a corpus: the kernels, or the library and why."""
        self._find_encoder()
        return self._speed

    def decode(self, token_ids: Sequence[int] | IntArray) -> str:
        """Returns the text of tokens; special tokens are left out, and cut letters become U+FFFD."""
        return str(self._tokenizer.decode([int(token) for token in token_ids], skip_special_tokens=True))

    def _find_encoder(self) -> "ByteLevelEncoder | None":
        """Returns the kernels if they give this tokenizer's tokens; decided once."""
        with self._lock:
            if not self._speed:
                from model.byte_level import ProbeError, UnknownTokenizerError, load_byte_level_encoder

                try:
                    self._encoder = load_byte_level_encoder(self._tokenizer)
                    self._speed = f"kernels for byte-level BPE ({self._encoder.name})"
                except UnknownTokenizerError as error:
                    self._speed = f"the tokenizers library, since {error}"
                    _LOGGER.log(logging.WARNING if isinstance(error, ProbeError) else logging.INFO, "%s", self._speed)
            return self._encoder


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


def _check_texts(texts: pa.Array) -> None:
    if not pa.types.is_string(texts.type) and not pa.types.is_large_string(texts.type):
        raise InputError(f"tokenizer: texts are of type {texts.type}, must be string or large_string")
    if texts.null_count:
        raise InputError(f"tokenizer: {texts.null_count} texts are null, must be none")
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid as error:
        raise InputError(f"tokenizer: texts must be valid UTF-8: {error}") from error


def _encode_with_library(tokenizer: Tokenizer, texts: pa.Array) -> EncodedTexts:
    """Encodes texts with the library, in groups that bound the memory it takes."""
    groups: list[list[str]] = [[]]
    num_chars = 0
    for text in texts.to_pylist():
        if num_chars > _GROUP_CHARS:
            groups.append([])
            num_chars = 0
        groups[-1].append(text)
        num_chars += len(text)
    ids, starts, ends, lengths = [], [], [], []
    for group in groups:
        encodings = tokenizer.encode_batch(group, add_special_tokens=False)
        counts = np.array([len(encoding) for encoding in encodings], dtype=np.int64)
        spans = np.array([span for encoding in encodings for span in encoding.offsets], dtype=np.int64).reshape(-1, 2)
        starts_of_group, ends_of_group = _locate_in_bytes(group, spans, counts)
        ids.append(np.array([token for encoding in encodings for token in encoding.ids], dtype=np.int32))
        starts.append(starts_of_group)
        ends.append(ends_of_group)
        lengths.append(counts)
    offsets = np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64)
    token_ids = np.concatenate(ids)
    separable: MaskArray = np.zeros(len(token_ids), dtype=np.bool_)
    separable[offsets[:-1][np.diff(offsets) > 0]] = True
    return EncodedTexts(
        token_ids=token_ids,
        starts=np.concatenate(starts),
        ends=np.concatenate(ends),
        separable=separable,
        offsets=offsets,
    )


def _locate_in_bytes(texts: Sequence[str], spans: LongArray, counts: LongArray) -> tuple[LongArray, LongArray]:
    """Turns spans in characters (tokens, 2) into starts and ends in bytes of each token's text."""
    data = np.frombuffer("".join(texts).encode(), dtype=np.uint8)
    places = np.append(np.flatnonzero(data & 0xC0 != 0x80), len(data))  # of each character in bytes
    sizes = np.array([len(text) for text in texts], dtype=np.int64)
    firsts = np.repeat(np.cumsum(sizes) - sizes, counts)
    return places[spans[:, 0] + firsts] - places[firsts], places[spans[:, 1] + firsts] - places[firsts]


def _join_encoded(first: EncodedTexts, second: EncodedTexts, is_second: MaskArray) -> EncodedTexts:
    """Joins the tokens of two sets of texts; the mask says of which each text is."""
    counts = np.empty(len(is_second), dtype=np.int64)
    counts[~is_second], counts[is_second] = np.diff(first.offsets), np.diff(second.offsets)
    of_second = np.repeat(is_second, counts)

    def join(name: str) -> Any:
        values = getattr(first, name)
        joined = np.empty(len(of_second), dtype=values.dtype)
        joined[~of_second], joined[of_second] = values, getattr(second, name)
        return joined

    return EncodedTexts(
        token_ids=join("token_ids"),
        starts=join("starts"),
        ends=join("ends"),
        separable=join("separable"),
        offsets=np.cumsum(np.concatenate([[0], counts]), dtype=np.int64),
    )
