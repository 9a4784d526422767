"""Pairs of texts that may be near-duplicates, and their exact similarity: third and fourth step.

    texts -> words -> shingles -> signatures -> **candidate pairs** -> **verified pairs** -> duplicates

Signatures are cut into bands, and rows that agree in a whole band are candidates (locality-sensitive hashing). What the
bands propose is then measured on the shingle sets themselves, so no estimate ever decides: unverified, templated pages
chain into clusters that are mostly wrong.

The steps are columns in, columns out::

    find_equal_keys        keys of all texts    -> copies; only the first of them goes on
    hash_bands             a batch              -> a key for each band
    list_candidate_pairs   the keys of a band   -> pairs; unite_pairs joins those of all bands
    verify_pairs           pairs                -> exact Jaccard similarities

Rows are numbers of texts in the order of their ids, so candidates depend on the set of texts alone.
"""

from collections.abc import Sequence

import numba
import numpy as np

from pipelines.minhashing import Signatures
from pipelines.words import Bytes, Hashes, Indices, freeze_array, mix_bits
from schemas.errors import InputError

Jaccards = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

MAX_BUCKET = 256
"""Rows under one key up to which all pairs are candidates, see :func:`list_candidate_pairs`."""

_BAND_BASE = np.uint64(0x9E3779B97F4A7C15)
_PAIRS_PER_RUN = 1 << 22
_ROW_BITS = np.uint64(32)


def find_equal_keys(keys: Hashes) -> Indices:
    """Returns for each row the first row with an equal key, itself if there is none, int64 (N,).

    Exact copies can fill a bucket with as many rows as the corpus has copies of a sentence. They are joined to their
    first row directly, and only that one is compared with others. The key 0, a blank text's, equals nothing.

    Args:
        keys: uint64 (N,), see :class:`pipelines.minhashing.SignedTexts`.
    """
    firsts = np.arange(len(keys), dtype=np.int64)
    num_bits = _count_bits(2 * len(keys))
    _find_firsts(freeze_array(keys), np.full(1 << num_bits, -1, np.int64), np.uint64(64 - num_bits), firsts)
    return firsts


def hash_bands(signatures: Signatures, num_bands: int) -> Hashes:
    """Returns one key for each band of each signature, uint64 (N, num_bands); keys of different bands do not meet.

    Raises:
        InputError: ``num_bands`` does not divide the length of a signature.
    """
    num_rows, num_permutations = signatures.shape
    if num_bands < 1 or num_permutations % num_bands:
        raise InputError(f"bands: num_bands is {num_bands}, must divide the {num_permutations} values of a signature")
    keys = np.empty((num_rows, num_bands), np.uint64)
    _hash_bands(freeze_array(signatures), keys)
    return keys


def list_candidate_pairs(keys: Hashes, rows: Indices, max_bucket: int = MAX_BUCKET) -> tuple[Indices, int]:
    """Returns the pairs of rows that share a key.

    The rows of one key are a bucket. Up to ``max_bucket`` rows, all pairs of a bucket are candidates. In a larger one a
    row is paired with the first row of the bucket and with the ``max_bucket // 2`` rows that follow it, so a row never
    costs more than in a full bucket and the whole is bounded by ``len(keys) * (max_bucket // 2 + 1)`` pairs.

    What that loses: rows are in the order of content hashes, so those pairs are a random sample. The members of a
    cluster that makes up more than a few per cent of the bucket stay connected through each other. A small cluster in a
    large bucket of merely similar texts is found by its other bands, those that do not lie in the common text alone.
    The number of pairs left out is returned, so that a caller can report it and raise ``max_bucket``.

    Args:
        keys: uint64 (E,), of one band or of several.
        rows: int64 (E,), each below 2**32, in any order; a key and row that come twice count once.
        max_bucket: at least 2.

    Returns:
        Distinct pairs int64 (P, 2), left < right, ascending, and the number of pairs left out, over all buckets.

    Raises:
        InputError: ``max_bucket`` is below 2, a row is out of bounds, or there are not as many keys as rows.
    """
    if max_bucket < 2:
        raise InputError(f"candidates: max_bucket is {max_bucket}, must be at least 2")
    if len(keys) != len(rows):
        raise InputError(f"candidates: {len(keys)} keys and {len(rows)} rows, must be equally many")
    if len(rows) and not 0 <= rows.min() <= rows.max() < 1 << 32:
        raise InputError(f"candidates: rows are {rows.min()}..{rows.max()}, must be 0..{(1 << 32) - 1}")
    keys, rows = _group_shared(freeze_array(keys), freeze_array(rows))
    num_followers = np.empty(len(keys), np.int64)
    num_left_out = int(_count_followers(keys, max_bucket, num_followers))
    ends = np.cumsum(num_followers)
    found = np.empty(0, np.uint64)
    start = 0
    while start < len(rows):
        base = ends[start] - num_followers[start]
        end = max(start + 1, int(np.searchsorted(ends, base + _PAIRS_PER_RUN, side="right")))
        codes = np.empty(ends[end - 1] - base, np.uint64)
        _pair_followers(rows, num_followers, start, end, codes)
        found = np.union1d(found, codes)
        start = end
    return _unpack_pairs(found), num_left_out


def unite_pairs(parts: Sequence[Indices]) -> Indices:
    """Returns the distinct pairs of several lists, int64 (P, 2), ascending.

    Args:
        parts: pairs int64 (P, 2) each, as :func:`list_candidate_pairs` returns them.
    """
    codes = [part[:, 0].astype(np.uint64) << _ROW_BITS | part[:, 1].astype(np.uint64) for part in parts]
    return _unpack_pairs(np.unique(np.concatenate([np.empty(0, np.uint64), *codes])))


def verify_pairs(pairs: Indices, hashes: Hashes, offsets: Indices) -> Jaccards:
    """Returns the exact Jaccard similarity of the shingle sets of each pair, float64 (P,); of two empty sets it is 0.

    Args:
        pairs: rows int64 (P, 2).
        hashes: the sets of all rows, ascending and unique in each, see :func:`pipelines.shingling.shingle_texts`; may
            be mapped from a file, since only the rows of the pairs are looked at.
        offsets: their offsets (N+1,).

    Raises:
        InputError: a pair names a row that is not there.
    """
    return verify_across(pairs, hashes, offsets, hashes, offsets)


def verify_across(
    pairs: Indices, left_hashes: Hashes, left_offsets: Indices, right_hashes: Hashes, right_offsets: Indices
) -> Jaccards:
    """Returns the exact Jaccard similarities of pairs of a left and a right set, float64 (P,).

    Args:
        pairs: rows int64 (P, 2), the first of a left set, the second of a right one.
        left_hashes: the left sets, as in :func:`verify_pairs`.
        left_offsets: their offsets (N+1,).
        right_hashes: the right sets.
        right_offsets: their offsets (M+1,).

    Raises:
        InputError: a pair names a row that is not there.
    """
    jaccards = np.empty(len(pairs), np.float64)
    num_done = _measure_pairs(
        freeze_array(pairs),
        freeze_array(left_hashes),
        freeze_array(left_offsets),
        freeze_array(right_hashes),
        freeze_array(right_offsets),
        jaccards,
    )
    if num_done < len(pairs):
        left, right = pairs[num_done].tolist()
        raise InputError(
            f"pairs: pair {num_done} is {left}, {right}, but there are {len(left_offsets) - 1} left and "
            f"{len(right_offsets) - 1} right sets of {len(left_hashes)} and {len(right_hashes)} shingles"
        )
    return jaccards


def _count_bits(num_slots: int) -> int:
    """Returns the bits that number at least so many slots; a shift by 64 minus them makes a slot of a hash."""
    return max(1, (num_slots - 1).bit_length())


def _group_shared(keys: Hashes, rows: Indices) -> tuple[Hashes, Indices]:
    """Returns the distinct (key, row) with the rows of a key together and ascending; most keys of single rows are gone.

    Most keys come once, and a table of counters is enough to see that of three quarters of them or more.
    """
    num_bits = _count_bits(4 * len(keys))
    counters = np.zeros(1 << num_bits, np.uint8)
    chosen_keys, chosen_rows = np.empty(len(keys), np.uint64), np.empty(len(keys), np.int64)
    num_chosen = _choose_shared(keys, rows, counters, np.uint64(64 - num_bits), chosen_keys, chosen_rows)
    num_bits = _count_bits(num_chosen)
    places = np.zeros((1 << num_bits) + 1, np.int64)
    keys, rows = np.empty(num_chosen, np.uint64), np.empty(num_chosen, np.int64)
    shift = np.uint64(64 - num_bits)
    num_grouped = _group_rows(chosen_keys[:num_chosen], chosen_rows[:num_chosen], places, shift, keys, rows)
    return keys[:num_grouped], rows[:num_grouped]


def _unpack_pairs(codes: Hashes) -> Indices:
    return np.stack([codes >> _ROW_BITS, codes & np.uint64((1 << 32) - 1)], axis=1).astype(np.int64)


# Kernels --------------------------------------------------------------------------------------------------------------


@numba.njit(cache=True, nogil=True)
def _find_slot(key: np.uint64, shift: np.uint64) -> np.int64:
    return np.int64((key * _BAND_BASE) >> shift)


@numba.njit(cache=True, nogil=True)
def _find_firsts(keys: Hashes, slots: Indices, shift: np.uint64, firsts: Indices) -> None:
    """Looks up every key in a hash table of rows with open addressing, at most half full."""
    for row in range(len(keys)):
        key = keys[row]
        if key == 0:
            continue
        slot = _find_slot(key, shift)
        while slots[slot] >= 0 and keys[slots[slot]] != key:
            slot = (slot + 1) & (len(slots) - 1)
        if slots[slot] < 0:
            slots[slot] = row
        firsts[row] = slots[slot]


@numba.njit(cache=True, nogil=True)
def _hash_bands(signatures: Signatures, keys: Hashes) -> None:
    num_rows, num_bands = keys.shape
    size = signatures.shape[1] // num_bands
    for row in range(num_rows):
        for band in range(num_bands):
            key = np.uint64(band + 1)
            for place in range(band * size, (band + 1) * size):
                key = mix_bits(key * _BAND_BASE + np.uint64(signatures[row, place]))
            keys[row, band] = key


@numba.njit(cache=True, nogil=True)
def _choose_shared(
    keys: Hashes, rows: Indices, counters: Bytes, shift: np.uint64, chosen_keys: Hashes, chosen_rows: Indices
) -> int:
    """Copies the entries whose key meets another entry's in a table of counters that stop at two; returns how many."""
    for key in keys:
        slot = _find_slot(key, shift)
        counters[slot] = min(counters[slot] + 1, 2)
    num_chosen = 0
    for entry in range(len(keys)):
        if counters[_find_slot(keys[entry], shift)] > 1:
            chosen_keys[num_chosen] = keys[entry]
            chosen_rows[num_chosen] = rows[entry]
            num_chosen += 1
    return num_chosen


@numba.njit(cache=True, nogil=True)
def _group_rows(
    keys: Hashes, rows: Indices, places: Indices, shift: np.uint64, grouped_keys: Hashes, grouped_rows: Indices
) -> int:
    """Distributes entries over about as many buckets, sorts each by key and row, and drops repetitions.

    Returns how many are left. ``places`` holds zeros, one more than there are buckets.
    """
    for key in keys:
        places[_find_slot(key, shift) + 1] += 1
    for bucket in range(len(places) - 1):
        places[bucket + 1] += places[bucket]
    for entry in range(len(keys)):
        slot = _find_slot(keys[entry], shift)
        grouped_keys[places[slot]] = keys[entry]
        grouped_rows[places[slot]] = rows[entry]
        places[slot] += 1
    num_grouped, start = 0, 0
    for bucket in range(len(places) - 1):
        end = places[bucket]
        # Shell's sort: nothing but an insertion sort for the usual few, bearable for thousands under one key.
        gap = 1
        while 3 * gap + 1 < end - start:
            gap = 3 * gap + 1
        while gap > 0:
            for place in range(start + gap, end):
                key, row = grouped_keys[place], grouped_rows[place]
                hole = place
                while hole - gap >= start and (
                    grouped_keys[hole - gap] > key
                    or (grouped_keys[hole - gap] == key and grouped_rows[hole - gap] > row)
                ):
                    grouped_keys[hole], grouped_rows[hole] = grouped_keys[hole - gap], grouped_rows[hole - gap]
                    hole -= gap
                grouped_keys[hole], grouped_rows[hole] = key, row
            gap //= 3
        for place in range(start, end):
            key, row = grouped_keys[place], grouped_rows[place]
            if place == start or key != grouped_keys[num_grouped - 1] or row != grouped_rows[num_grouped - 1]:
                grouped_keys[num_grouped], grouped_rows[num_grouped] = key, row
                num_grouped += 1
        start = end
    return num_grouped


@numba.njit(cache=True, nogil=True)
def _count_followers(keys: Hashes, max_bucket: int, num_followers: Indices) -> int:
    """Writes with how many of the rows after it under the same key each row is paired; returns the pairs left out."""
    num_left_out, start = 0, 0
    while start < len(keys):
        end = start + 1
        while end < len(keys) and keys[end] == keys[start]:
            end += 1
        for place in range(start, end):
            following = end - 1 - place
            reach = following
            if end - start > max_bucket and place > start:
                reach = min(following, max_bucket // 2)
            num_followers[place] = reach
            num_left_out += following - reach
        start = end
    return num_left_out


@numba.njit(cache=True, nogil=True)
def _pair_followers(rows: Indices, num_followers: Indices, start: int, end: int, codes: Hashes) -> None:
    """Pairs each row from ``start`` to ``end`` with the rows after it, as ``left << 32 | right``."""
    num_codes = 0
    for place in range(start, end):
        left = np.uint64(rows[place]) << _ROW_BITS
        for follower in range(place + 1, place + 1 + num_followers[place]):
            codes[num_codes] = left | np.uint64(rows[follower])
            num_codes += 1


@numba.njit(cache=True, nogil=True)
def _measure_pairs(
    pairs: Indices,
    left_hashes: Hashes,
    left_offsets: Indices,
    right_hashes: Hashes,
    right_offsets: Indices,
    jaccards: Jaccards,
) -> int:
    """Merges the two sorted sets of each pair; returns how many pairs were done, fewer if one names a missing set."""
    for pair in range(len(pairs)):
        left, right = pairs[pair]
        if left < 0 or left >= len(left_offsets) - 1 or right < 0 or right >= len(right_offsets) - 1:
            return pair
        i, left_end = left_offsets[left], left_offsets[left + 1]
        j, right_end = right_offsets[right], right_offsets[right + 1]
        if i < 0 or left_end > len(left_hashes) or j < 0 or right_end > len(right_hashes):
            return pair
        total = left_end - i + right_end - j
        common = 0
        # Without branches: which of the two comes next cannot be foreseen.
        while i < left_end and j < right_end:
            left_hash, right_hash = left_hashes[i], right_hashes[j]
            common += left_hash == right_hash
            i += left_hash <= right_hash
            j += right_hash <= left_hash
        jaccards[pair] = common / (total - common) if total else 0.0
    return len(pairs)
