"""Texts as sets of hashed shingles: the first step of near-duplicate removal.

    texts -> words -> **shingles** -> signatures -> candidate pairs -> verified pairs -> duplicates

A shingle is a run of ``num_words`` words (:mod:`pipelines.words`), and two references are near-duplicates if their sets
of shingles overlap. A text of fewer words than a shingle holds is one shingle, so only a blank text has an empty set.
The hash of a shingle is a polynomial in the hashes of its words; stored sets rest on it, so it must not change.
"""

import numba
import numpy as np
import pyarrow as pa

from pipelines.words import Counts, Hashes, Indices, iterate_words, mix_bits
from schemas.errors import InputError

_SHINGLE_BASE = np.uint64(0xD1B54A32D192ED03)


def shingle_texts(texts: pa.Array | pa.ChunkedArray, num_words: int) -> tuple[Hashes, Indices]:
    """Returns the set of hashed shingles of every text.

    The hash of a shingle depends on its words only, not on the batch. Beside the result, which is held twice for a
    moment, memory is a few dozen bytes for each byte of the longest text.

    Args:
        texts: N texts, as :func:`pipelines.words.find_words` takes them.
        num_words: words in a shingle, at least 1.

    Returns:
        The hashes of all texts one after the other, ascending and unique within each text, and their offsets int64
        (N+1,): text ``i`` has ``hashes[offsets[i]:offsets[i + 1]]``.

    Raises:
        InputError: ``num_words`` is below 1, or ``texts`` are not strings.
    """
    check_num_words(num_words)
    sets: list[Hashes] = []
    offsets = np.zeros(len(texts) + 1, np.int64)
    windows, places, hashes = np.empty(0, np.uint64), np.empty(0, np.int32), np.empty(0, np.uint64)
    for first, words in iterate_words(texts):
        size = len(words.hashes)
        if size > len(hashes):
            windows, places, hashes = (
                np.empty(size, np.uint64),
                np.empty(2 * size + 2, np.int32),
                np.empty(size, np.uint64),
            )
        ends = offsets[first : first + len(words.offsets)]
        num_hashes = _shingle_rows(words.hashes, words.offsets, num_words, windows, places, hashes, ends)
        sets.append(hashes[:num_hashes].copy())
    return np.concatenate(sets) if sets else np.empty(0, np.uint64), offsets


def check_num_words(num_words: int) -> None:
    """Raises InputError unless shingles can have this many words."""
    if num_words < 1:
        raise InputError(f"shingles: num_words is {num_words}, must be at least 1")


@numba.njit(cache=True, nogil=True)
def hash_windows(words: Hashes, start: int, end: int, num_words: int, hashes: Hashes) -> int:
    """Writes the hashes of all shingles of ``words[start:end]`` in order, repetitions too; for kernels.

    Returns how many: ``end - start - num_words + 1``, but at least one.
    """
    size = min(num_words, end - start)
    # With w for the words of a window: size * B**size + w[0] * B**(size - 1) + ... + w[size - 1]
    polynomial, constant, power = np.uint64(0), np.uint64(size), np.uint64(1)
    for place in range(start, start + size):
        polynomial = polynomial * _SHINGLE_BASE + words[place]
        power *= _SHINGLE_BASE
    constant *= power
    hashes[0] = mix_bits(polynomial + constant)
    num_hashes = end - start - size + 1
    for place in range(1, num_hashes):
        leaving = words[start + place - 1] * power
        polynomial = polynomial * _SHINGLE_BASE + (words[start + place + size - 1] - leaving)
        hashes[place] = mix_bits(polynomial + constant)
    return num_hashes


@numba.njit(cache=True, nogil=True)
def _shingle_rows(
    words: Hashes, bounds: Indices, num_words: int, windows: Hashes, places: Counts, hashes: Hashes, offsets: Indices
) -> int:
    """Writes the sorted sets of a tile of texts to ``hashes``, and their ends after ``offsets[0]``.

    ``windows`` and ``places`` are working space. Returns how many hashes were written.
    """
    base, end = offsets[0], 0
    for row in range(len(bounds) - 1):
        if bounds[row] < bounds[row + 1]:
            num_windows = hash_windows(words, bounds[row], bounds[row + 1], num_words, windows)
            end = _sort_unique(windows[:num_windows], places, hashes, end)
        offsets[row + 1] = base + end
    return end


@numba.njit(cache=True, nogil=True)
def _sort_unique(values: Hashes, places: Counts, hashes: Hashes, start: int) -> int:
    """Writes the distinct values, ascending, to ``hashes[start:]`` and returns where they end.

    The values are hashes, so their leading bits spread them evenly over about as many buckets as there are values. What
    is left for the insertion sort is the order within buckets of one or two; equal values cost it nothing.
    """
    shift = np.uint64(63)
    num_buckets = 2
    while num_buckets < len(values):
        num_buckets *= 2
        shift -= np.uint64(1)
    places[: num_buckets + 1] = 0
    for value in values:
        places[np.int64(value >> shift) + 1] += 1
    for bucket in range(num_buckets):
        places[bucket + 1] += places[bucket]
    for value in values:
        chosen = np.int64(value >> shift)
        hashes[start + places[chosen]] = value
        places[chosen] += 1
    end = start + 1
    for place in range(start + 1, start + len(values)):
        value = hashes[place]
        hole = end
        while hole > start and hashes[hole - 1] > value:
            hole -= 1
        if hole > start and hashes[hole - 1] == value:
            continue
        for moved in range(end, hole, -1):
            hashes[moved] = hashes[moved - 1]
        hashes[hole] = value
        end += 1
    return end
