"""Byte-level byte-pair encoding of whole Arrow arrays, ids and places, by kernels.

    texts -> pretokens (:mod:`model.pretokenizing`) -> **tokens** -> places

Byte-pair encoding (Sennrich et al., arXiv 1508.07909) starts with a pretoken's bytes and joins the two neighbours whose
merge was learned first, the leftmost of equals, until none are left to join. Text repeats itself, so each thread
keeps the tokens of pretokens it has met, found by their hash and compared by their bytes. Work is done in blocks of
about a megabyte, which keeps what is touched near the processor.
"""

import dataclasses
import itertools
import threading
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from model.merging import (
    FREE,
    NO_RANK,
    Ranks,
    Words,
    add_pairs,
    add_tokens,
    encode_pretokens,
    find_characters,
    find_places,
)
from model.pretokenizing import Pattern, find_pretokens
from schemas.errors import InputError
from schemas.protocols import EncodedTexts, IntArray, LongArray, MaskArray
from schemas.records import Bytes

BLOCK_BYTES = 1 << 20
"""Texts are encoded in groups of about this size; a longer one alone."""

CACHE_SLOTS = 1 << 17
CACHE_WORDS = 1 << 20
"""Size of a thread's cache: pretokens (half as many as slots), and words of eight bytes for long ones and for ids."""

MAX_TOKENS = 1 << 21
MAX_MERGES = (1 << 22) - 1
"""Bounds of a vocabulary: a pair of ids and the rank of its merge are kept in 64 bits."""

_PADDING = 16
_WORD_BYTES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merges:
    """What a byte-level byte-pair model has learned.

    Attributes:
        tokens: the bytes of each token that pretokens may become, by id.
        byte_ids: the token of each single byte, 256 of them.
        pairs: ids of the left and right tokens of each merge in the order learned, and of the token they become,
            int32 (merges, 3). No pair comes twice.
        whole: whether a pretoken that is a token becomes it, whatever the merges (``ignore_merges``).
    """

    tokens: Mapping[int, bytes]
    byte_ids: Sequence[int]
    pairs: IntArray
    whole: bool


class _Workspace(threading.local):
    """What a thread keeps between calls: its cache of pretokens, and room for a block."""

    def __init__(self) -> None:
        self.slots: Words = np.zeros(2 * CACHE_SLOTS, dtype=np.uint64)
        self.words: Words = np.empty(CACHE_WORDS, dtype=np.uint64)
        self.used: LongArray = np.zeros(2, dtype=np.int64)
        self.make_room(2 * BLOCK_BYTES)

    def make_room(self, num_bytes: int) -> None:
        self.data: Bytes = np.zeros(num_bytes + _PADDING, dtype=np.uint8)
        self.ends: LongArray = np.empty(num_bytes, dtype=np.int64)
        self.separable: MaskArray = np.empty(num_bytes, dtype=np.bool_)
        self.token_ids: IntArray = np.empty(num_bytes, dtype=np.int32)
        self.token_separable: MaskArray = np.empty(num_bytes, dtype=np.bool_)

    @property
    def room(self) -> int:
        return len(self.ends)


class BytePairEncoder:
    """Encodes texts with a byte-level byte-pair model. Any number of threads may use one at once."""

    def __init__(self, merges: Merges, pattern: Pattern) -> None:
        """Builds the tables.

        Raises:
            InputError: the vocabulary is too large, or a pair has two merges.
        """
        if max(merges.tokens, default=0) >= MAX_TOKENS or len(merges.pairs) > MAX_MERGES:
            size = f"{max(merges.tokens) + 1} tokens and {len(merges.pairs)} merges"
            raise InputError(f"tokenizer: the vocabulary has {size}, must be at most {MAX_TOKENS} and {MAX_MERGES}")
        self._pattern = pattern
        self._byte_ids = np.asarray(merges.byte_ids, dtype=np.int32)
        self._merged_ids = np.ascontiguousarray(merges.pairs[:, 2])
        self._pairs: Words = np.full(_get_capacity(len(merges.pairs)), FREE, dtype=np.uint64)
        if not add_pairs(self._pairs, np.ascontiguousarray(merges.pairs[:, :2], dtype=np.uint64)):
            raise InputError("tokenizer: two merges join the same pair, must be one")
        self._characters: Words = np.full(1 << 16, FREE, dtype=np.uint64)
        find_characters(self._pairs, self._merged_ids, self._byte_ids, self._characters)
        self._crossings = _find_crossings(merges)

        self._sizes: IntArray = np.zeros(max(merges.tokens) + 1, dtype=np.int32)
        self._sizes[list(merges.tokens)] = [len(token) for token in merges.tokens.values()]
        known = merges.tokens if merges.whole else {}
        ids = np.fromiter(known, dtype=np.int32, count=len(known))
        data = np.frombuffer(b"".join(known.values()), dtype=np.uint8)
        self._whole_slots: Words = np.zeros(2 * _get_capacity(len(known)), dtype=np.uint64)
        self._whole_words: Words = np.empty(len(data) // _WORD_BYTES + 2 * len(known), dtype=np.uint64)
        ends = np.cumsum(self._sizes[ids], dtype=np.int64)
        add_tokens(_view_words(pad_bytes(data)), ends, ids, self._whole_slots, self._whole_words)
        self._workspace = _Workspace()

    def encode(self, texts: pa.Array) -> EncodedTexts:
        """Encodes an array of type string or large_string, without nulls and of valid UTF-8."""
        data, bounds = read_strings(texts)
        limits = [0]
        while limits[-1] < len(texts):
            first = limits[-1]
            last = int(np.searchsorted(bounds, bounds[first] + BLOCK_BYTES, side="right")) - 1
            limits.append(max(last, first + 1))
        blocks = [self._encode_block(data, bounds[a : b + 1]) for a, b in itertools.pairwise(limits)]
        if len(blocks) == 1:
            return blocks[0]
        counts = [np.diff(block.offsets) for block in blocks]
        return EncodedTexts(
            token_ids=np.concatenate([np.empty(0, dtype=np.int32), *(block.token_ids for block in blocks)]),
            starts=np.concatenate([np.empty(0, dtype=np.int64), *(block.starts for block in blocks)]),
            ends=np.concatenate([np.empty(0, dtype=np.int64), *(block.ends for block in blocks)]),
            separable=np.concatenate([np.empty(0, dtype=np.bool_), *(block.separable for block in blocks)]),
            offsets=np.cumsum(np.concatenate([[0], *counts]), dtype=np.int64),
        )

    def _encode_block(self, data: Bytes, bounds: LongArray) -> EncodedTexts:
        num_bytes = int(bounds[-1] - bounds[0])
        space = self._workspace
        if num_bytes > space.room:
            space.make_room(num_bytes)
        space.data[:num_bytes] = data[bounds[0] : bounds[-1]]
        counts = np.empty(len(bounds) - 1, dtype=np.int64)
        find_pretokens(space.data, bounds - bounds[0], self._pattern, space.ends, space.separable, counts)
        offsets = np.zeros(len(bounds), dtype=np.int64)
        encode_pretokens(
            space.data,
            _view_words(space.data),
            space.ends,
            space.separable,
            counts,
            (self._byte_ids, self._crossings, self._characters, self._pairs, self._merged_ids),
            (self._whole_slots, self._whole_words),
            (space.slots, space.words, space.used),
            space.token_ids,
            space.token_separable,
            offsets,
        )
        num_tokens = int(offsets[-1])
        token_ids = space.token_ids[:num_tokens].copy()
        separable = space.token_separable[:num_tokens].copy()
        starts, ends = np.empty(num_tokens, dtype=np.int64), np.empty(num_tokens, dtype=np.int64)
        find_places(token_ids, offsets, self._sizes, starts, ends)
        if space.room > 2 * BLOCK_BYTES:  # one long text must not hold its memory for ever
            space.make_room(2 * BLOCK_BYTES)
        return EncodedTexts(token_ids=token_ids, starts=starts, ends=ends, separable=separable, offsets=offsets)


def read_strings(texts: pa.Array) -> tuple[Bytes, LongArray]:
    """Returns the bytes under an array of N strings without copying, and where each text is, int64 (N+1,)."""
    _, offsets, data = texts.buffers()
    if not len(texts):
        return np.empty(0, dtype=np.uint8), np.zeros(1, dtype=np.int64)
    bounds = np.frombuffer(offsets, dtype=np.int64 if pa.types.is_large_string(texts.type) else np.int32)
    bounds_of_slice: LongArray = bounds[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    return np.frombuffer(data if data is not None else b"", dtype=np.uint8), bounds_of_slice


def _find_crossings(merges: Merges) -> Ranks:
    """Returns the first merge that can cut into a character between two bytes, the one before ``<< 8 |`` that after.

    Such a merge joins the rest of a character to what follows it, or the beginning of one to what is before it.
    """
    crossings: Ranks = np.full(1 << 16, NO_RANK, dtype=np.uint32)
    known = {token: text for token, text in merges.tokens.items() if text}
    lasts, firsts = np.zeros((2, max(known) + 1), dtype=np.int64)
    is_rest, is_beginning = np.zeros((2, max(known) + 1), dtype=np.bool_)
    for token, text in known.items():
        firsts[token], lasts[token] = text[0], text[-1]
        is_rest[token] = all(0x80 <= byte < 0xC0 for byte in text)
        is_beginning[token] = text[0] >= 0xC0 and len(text) < (2 if text[0] < 0xE0 else 3 if text[0] < 0xF0 else 4)
    left, right = merges.pairs[:, 0], merges.pairs[:, 1]
    ranks = np.flatnonzero(is_rest[left] | is_beginning[right])
    np.minimum.at(crossings, lasts[left[ranks]] << 8 | firsts[right[ranks]], ranks.astype(np.uint32))
    return crossings


def _get_capacity(num_items: int) -> int:
    """Returns the size of a table, a power of two, that these items fill at most half."""
    return 1 << max(4, (2 * num_items).bit_length())


def pad_bytes(data: Bytes) -> Bytes:
    """Returns a copy with as many more bytes as kernels may read past the end."""
    return np.append(data, np.zeros(_PADDING, dtype=np.uint8))


def _view_words(data: Bytes) -> Words:
    """Returns the eight bytes from each byte on as a number, without copying; the last 7 bytes have none."""
    return np.ndarray(len(data) - _WORD_BYTES + 1, dtype="<u8", buffer=data, strides=(1,))
