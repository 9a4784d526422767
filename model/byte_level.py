"""Which tokenizers the kernels may stand in for, and the proof that they give the same tokens.

    tokenizer.json -> **is it a byte-level BPE of a known pattern?** -> :class:`model.byte_pairs.BytePairEncoder`

What a tokenizer does is read from its own description; whatever is not known here (other models, patterns, normalizers)
leaves it to the ``tokenizers`` library. Texts that only the library can do right, such as those to be normalized, are
told apart one by one. And before any result is used, both encode a set of probe texts and must agree.
"""

import functools
import itertools
import json
import unicodedata
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from model.byte_pairs import BytePairEncoder, Merges, pad_bytes, read_strings
from model.pretokenizing import NUM_CLASSIFIED, OTHER, find_pattern, find_texts_with_others
from schemas.errors import InputError
from schemas.protocols import EncodedTexts, MaskArray
from schemas.records import Bytes

MAX_ADDED_TOKENS = 64
"""Texts are searched for each added token that is not special; with more of them the library is faster."""

_HANGUL_PARTS = ((0x1161, 0x1176), (0x11A8, 0x11C3))
_PROBED_TOKENS = 4096
_PROBE_CHARS = 500


class UnknownTokenizerError(InputError):
    """A tokenizer that the kernels cannot stand in for; the message says why."""


class ProbeError(UnknownTokenizerError):
    """The kernels gave other tokens than the library."""


class ByteLevelEncoder:
    """The kernels in place of a byte-level BPE of the ``tokenizers`` library."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Reads the tokenizer, which must have ``encode_special_tokens`` set.

        Raises:
            UnknownTokenizerError: the tokenizer is not of a known kind.
        """
        parts = json.loads(tokenizer.to_str())
        pattern = find_pattern(parts["pre_tokenizer"])
        if pattern is None:
            raise UnknownTokenizerError("its pre-tokenizer is not one of the known byte-level ones")
        merges = read_merges(parts["model"])
        self._added_tokens = [token["content"] for token in parts["added_tokens"] if not token["special"]]
        if len(self._added_tokens) > MAX_ADDED_TOKENS:
            raise UnknownTokenizerError(f"it has more than {MAX_ADDED_TOKENS} added tokens that are not special")
        if parts["normalizer"] not in (None, {"type": "NFC"}):
            raise UnknownTokenizerError("it normalizes texts")
        self._normalizer = tokenizer.normalizer if parts["normalizer"] else None
        for token in self._added_tokens:
            if not token or (self._normalizer and self._normalizer.normalize_str(token) != token):
                raise UnknownTokenizerError(f"its added token {token!r} is empty or not normalized")
        self._encoder = BytePairEncoder(merges, pattern)
        self.name = pattern.name

    def encode(self, texts: pa.Array) -> EncodedTexts:
        """Encodes texts none of which is an exception: string or large_string, no nulls, valid UTF-8."""
        return self._encoder.encode(texts)

    def find_exceptions(self, texts: pa.Array) -> MaskArray:
        """Marks the texts that only the library encodes right, shape (texts,).

        These are texts that normalization would change, and those that spell an added token that is not special.
        """
        exceptions = np.zeros(len(texts), dtype=np.bool_)
        for token in self._added_tokens:
            exceptions |= pc.match_substring(texts, token).to_numpy(zero_copy_only=False)
        if self._normalizer is not None:
            data, bounds = read_strings(texts)
            copy = pad_bytes(data[bounds[0] : bounds[-1]])
            is_doubtful = find_texts_with_others(copy, bounds - bounds[0], _get_plain_table())
            for row in np.flatnonzero(is_doubtful).tolist():
                text = texts[row].as_py()
                exceptions[row] |= self._normalizer.normalize_str(text) != text
        return exceptions


def load_byte_level_encoder(tokenizer: Tokenizer) -> ByteLevelEncoder:
    """Reads a tokenizer, which must have ``encode_special_tokens`` set, and checks the kernels against it.

    Raises:
        UnknownTokenizerError: the tokenizer is not of a known kind.
        ProbeError: it gives other tokens for a probe text.
    """
    encoder = ByteLevelEncoder(tokenizer)
    texts = pa.array(iterate_probe_texts(tokenizer), pa.string())
    texts = texts.filter(pa.array(~encoder.find_exceptions(texts)))
    found = encoder.encode(texts)
    expected = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts.to_pylist(), add_special_tokens=False)]
    lengths = np.fromiter(map(len, expected), dtype=np.int64, count=len(expected))
    ids = np.fromiter(itertools.chain.from_iterable(expected), dtype=np.int32, count=int(lengths.sum()))
    if not np.array_equal(np.diff(found.offsets), lengths) or not np.array_equal(found.token_ids, ids):
        bounds = np.cumsum(np.concatenate([[0], lengths]))
        pairs = zip(itertools.pairwise(found.offsets.tolist()), itertools.pairwise(bounds.tolist()), strict=True)
        rows = (row for row, ((a, b), (c, d)) in enumerate(pairs) if not np.array_equal(found.token_ids[a:b], ids[c:d]))
        raise ProbeError(f"its tokens of the probe {texts[next(rows)].as_py()!r:.80} are others")
    return encoder


def read_merges(model: dict[str, Any]) -> Merges:
    """Reads the part ``model`` of a ``tokenizer.json``.

    Raises:
        UnknownTokenizerError: the model is not a BPE over bytes, or does more than merge.
    """
    if model["type"] != "BPE":
        raise UnknownTokenizerError(f"its model is {model['type']}, not BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback"):
        if model.get(name):
            raise UnknownTokenizerError(f"its model has {name}")
    vocabulary: dict[str, int] = model["vocab"]
    letters = _get_byte_letters()
    if not all(letter in vocabulary for letter in letters):
        raise UnknownTokenizerError("its vocabulary lacks some of the 256 bytes")
    # Letters that stand for no byte become one beyond latin-1, so that their tokens, which no text has, are seen.
    to_latin = {ord(letter): byte for byte, letter in enumerate(letters)}
    to_latin = {point: to_latin.get(point, 0xFFFF) for token in vocabulary for point in map(ord, token)}
    tokens = {}
    for token, token_id in vocabulary.items():
        text = token.translate(to_latin)
        if text and "\uffff" not in text:
            tokens[token_id] = text.encode("latin-1")
    merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    pairs = [(vocabulary[left], vocabulary[right], vocabulary[left + right]) for left, right in merges]
    return Merges(
        tokens=tokens,
        byte_ids=[vocabulary[letter] for letter in letters],
        pairs=np.array(pairs, dtype=np.int32).reshape(-1, 3),
        whole=bool(model.get("ignore_merges")),
    )


def iterate_probe_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Yields texts that show a difference in classes of characters, pattern, merges or added tokens.

    Every character of Unicode's basic plane and some beyond in mixed order, every short sequence of a few telling
    characters, runs too long for a word, the words of the vocabulary, and the added tokens.
    """
    points = np.concatenate([np.arange(0xD800), np.arange(0xE000, 0x10000), np.arange(0x10000, 0x40000, 61)])
    points = np.random.default_rng(0).permutation(np.append(points, [0xE0001, 0xF0000, 0x10FFFF]))
    mixed = points.astype("<u4").tobytes().decode("utf-32-le")
    yield from (mixed[start : start + _PROBE_CHARS] for start in range(0, len(mixed), _PROBE_CHARS))
    yield from map("".join, itertools.product("a1 \t\n!'", repeat=4))
    yield from map("".join, itertools.product("aé中\u03011² \t\r\n\u3000\u0085!'\u2019", repeat=3))
    for ending in ("s", "t", "re", "ve", "m", "ll", "d", "\u017f", "\u017fe", "rE", "lL", "r", "v", "l", "ß", "K"):
        yield from (f"a{mark}{cased}b" for mark in "'\u2019" for cased in (ending, ending.upper(), ending.title()))
    yield from (unit * 400 for unit in ("a", " ", "\n", "=", "9", "中", "é\u0301", "xy", " \n", "\t "))
    num_tokens = tokenizer.get_vocab_size(with_added_tokens=False)
    chosen = [tokenizer.decode([token]) for token in range(0, num_tokens, num_tokens // _PROBED_TOKENS + 1)]
    yield from ("".join(chosen[start : start + 50]) for start in range(0, len(chosen), 50))
    yield from (f"a {token.content} b{token.content}" for token in tokenizer.get_added_tokens_decoder().values())


def _get_byte_letters() -> list[str]:
    """Returns the letter of each byte in a vocabulary: itself if it can be seen, else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte) if byte in visible else chr(next(others)) for byte in range(256)]


@functools.cache
def _get_plain_table() -> Bytes:
    """Returns OTHER for each code point that normal form C may change or join to another, 1 for all the rest.

    Characters this Python does not know are among the former. By Unicode's promise of stability, what it knows stays.
    """
    table: Bytes = np.full(NUM_CLASSIFIED, OTHER, dtype=np.uint8)
    seconds = set()
    for point in range(0x20000):
        letter = chr(point)
        parts = unicodedata.decomposition(letter).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            seconds.add(int(parts[1], 16))
        is_known = unicodedata.category(letter) not in ("Cn", "Cs")
        table[point] = is_known and not unicodedata.combining(letter) and unicodedata.is_normalized("NFC", letter)
    table[sorted(seconds)] = OTHER
    for start, end in _HANGUL_PARTS:
        table[start:end] = OTHER
    return table
