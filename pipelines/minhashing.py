"""MinHash signatures of shingle sets: the second step of near-duplicate removal.

    texts -> words -> shingles -> **signatures** -> candidate pairs -> verified pairs -> duplicates

Two rows agree at a position with a probability equal to the Jaccard similarity of their sets. The values are those of
datasketch 2.0's scheme ``affine32``, bit for bit, so that stored signatures can be read with that library::

    LeanMinHash(hashvalues=row, scheme="affine32", seed=seed)

The shingles of a text live for as long as its row is computed; they are not sorted, since a minimum does not mind
repetitions. Sets are made again for the few texts that are compared (:mod:`pipelines.shingling`).
"""

from typing import NamedTuple

import numba
import numpy as np
import pyarrow as pa

from pipelines.shingling import check_num_words, hash_windows
from pipelines.words import Hashes, Indices, iterate_words, mix_bits
from schemas.errors import InputError

Signatures = np.ndarray[tuple[int, ...], np.dtype[np.uint32]]

EMPTY_VALUE = 0xFFFFFFFF
"""Every value of the signature of an empty set."""

_SEQUENCE_BASE = np.uint64(0x9E3779B97F4A7C15)
_RUN = 1024
_GROUP = 8
"""Shingles whose minimum is taken at once; the kernel is written out for this many."""


class SignedTexts(NamedTuple):
    """What near-duplicate removal keeps of N texts.

    Attributes:
        signatures: uint32 (N, num_permutations).
        sequence_keys: a hash of each text's sequence of words (N,): equal for equal sequences, 0 for a blank text.
        num_shingles: shingles of each text (N,), repetitions counted; 0 for a blank text.
    """

    signatures: Signatures
    sequence_keys: Hashes
    num_shingles: Indices


def draw_permutations(num_permutations: int, seed: int) -> tuple[Signatures, Signatures]:
    """Draws the factors (odd) and summands of datasketch's ``affine32`` permutations, both uint32 (permutations,).

    Args:
        num_permutations: how many, at least 1.
        seed: from 0 to 2**32 - 1.

    Raises:
        InputError: a value out of bounds.
    """
    if num_permutations < 1:
        raise InputError(f"signatures: num_permutations is {num_permutations}, must be at least 1")
    if not 0 <= seed < 1 << 32:
        raise InputError(f"signatures: seed is {seed}, must be 0..{(1 << 32) - 1}")
    generator = np.random.RandomState(seed)
    factors = generator.randint(0, 1 << 31, num_permutations, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    return factors, generator.randint(0, 1 << 32, num_permutations, dtype=np.uint32)


def sign_texts(texts: pa.Array | pa.ChunkedArray, num_words: int, num_permutations: int, seed: int) -> SignedTexts:
    """Returns the MinHash signature of every text's set of shingles, with a key of its words.

    Only the low 32 bits of the shingles' hashes count. Beside the result, memory is a few dozen bytes for each byte of
    the longest text.

    Args:
        texts: N texts, as :func:`pipelines.words.find_words` takes them.
        num_words: words in a shingle, at least 1.
        num_permutations: length of a signature.
        seed: seed of the permutations; signatures of different seeds cannot be compared.

    Raises:
        InputError: a value out of bounds, or ``texts`` are not strings.
    """
    check_num_words(num_words)
    factors, summands = draw_permutations(num_permutations, seed)
    signed = SignedTexts(
        np.full((len(texts), num_permutations), EMPTY_VALUE, np.uint32),
        np.zeros(len(texts), np.uint64),
        np.zeros(len(texts), np.int64),
    )
    for first, words in iterate_words(texts):
        rows = slice(first, first + len(words.offsets) - 1)
        _sign_rows(
            words.hashes,
            words.offsets,
            num_words,
            factors,
            summands,
            signed.signatures[rows],
            signed.sequence_keys[rows],
            signed.num_shingles[rows],
        )
    return signed


@numba.njit(cache=True, nogil=True)
def _sign_rows(
    words: Hashes,
    bounds: Indices,
    num_words: int,
    factors: Signatures,
    summands: Signatures,
    signatures: Signatures,
    sequence_keys: Hashes,
    num_shingles: Indices,
) -> None:
    """Fills in the rows of a tile of texts; the rows of blank texts stay as they are."""
    windows = np.empty(_RUN, np.uint64)
    values = np.empty(_RUN, np.uint32)
    for row in range(len(bounds) - 1):
        start, end = bounds[row], bounds[row + 1]
        if start == end:
            continue
        # Not a polynomial: with any factor, those of two long sequences that repeat two words in a certain order meet.
        key = np.uint64(end - start)
        for place in range(start, end):
            key = (key ^ words[place]) * _SEQUENCE_BASE
            key ^= key >> np.uint64(32)
        sequence_keys[row] = max(mix_bits(key), np.uint64(1))
        num_shingles[row] = max(end - start - num_words + 1, 1)
        for first in range(start, start + num_shingles[row], _RUN):
            num_windows = hash_windows(words, first, min(first + _RUN + num_words - 1, end), num_words, windows)
            _mix_low_bits(windows, num_windows, values)
            _lower_minima(values, num_windows, factors, summands, signatures[row])


@numba.njit(cache=True, nogil=True)
def _mix_low_bits(hashes: Hashes, num_hashes: int, values: Signatures) -> None:
    """MurmurHash3's finaliser for 32 bits, which datasketch applies before permuting; fills up the last group."""
    for place in range(num_hashes):
        value = np.uint32(hashes[place])
        value = np.uint32((value ^ (value >> np.uint32(16))) * np.uint32(0x85EBCA6B))
        value = np.uint32((value ^ (value >> np.uint32(13))) * np.uint32(0xC2B2AE35))
        values[place] = value ^ (value >> np.uint32(16))
    for place in range(num_hashes, -(-num_hashes // _GROUP) * _GROUP):
        values[place] = values[num_hashes - 1]


@numba.njit(cache=True, nogil=True)
def _lower_minima(
    values: Signatures, num_values: int, factors: Signatures, summands: Signatures, minima: Signatures
) -> None:
    """Lowers each minimum to the least permuted value, a group of values a pass over the permutations.

    The inner loop runs over permutations, so that it is vector instructions throughout, and takes a group at once, so
    that most of them compute instead of loading and storing.
    """
    for place in range(0, num_values, _GROUP):
        a, b, c, d = values[place], values[place + 1], values[place + 2], values[place + 3]
        e, f, g, h = values[place + 4], values[place + 5], values[place + 6], values[place + 7]
        for column in range(len(minima)):
            factor, summand = factors[column], summands[column]
            low = min(np.uint32(a * factor + summand), np.uint32(b * factor + summand))
            low = min(low, min(np.uint32(c * factor + summand), np.uint32(d * factor + summand)))
            high = min(np.uint32(e * factor + summand), np.uint32(f * factor + summand))
            high = min(high, min(np.uint32(g * factor + summand), np.uint32(h * factor + summand)))
            minima[column] = min(minima[column], min(low, high))
