"""Pairs of references that may be near-duplicates, and their exact similarity: third and fourth step.

    texts -> shingles -> signatures -> **candidate pairs** -> **verified pairs** -> duplicates

Signatures are cut into bands, and rows that agree in a whole band are candidates (locality-sensitive hashing). What the
bands propose is then measured on the shingle sets themselves, so no estimate ever decides: unverified, templated pages
chain into clusters that are mostly wrong.

The steps are columns in, columns out, so that they fit jobs with one grouping each::

    hash_sets         a batch           -> find_equal_sets over all rows; only the first of equal sets goes on
    hash_bands        a batch           -> partition_keys -> grouping by partition
    list_candidate_pairs   a partition  -> pairs, the union over partitions
    verify_pairs      pairs             -> exact Jaccard similarities

Rows are numbers of references in the order of their ids, so candidates depend on the set of references alone.
"""

import numpy as np

from pipelines.minhashing import Signatures
from pipelines.shingling import Hashes, Indices, iterate_tiles, mix_bits
from schemas.errors import InputError

Jaccards = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

MAX_BUCKET = 256
"""Rows under one key up to which all pairs are candidates, see :func:`list_candidate_pairs`."""

_BAND_BASE = np.uint64(0x9E3779B97F4A7C15)
_PAIRS_PER_RUN = 1 << 22
_ROW_BITS = np.uint64(32)
_PACKED = np.dtype("<u8")


def hash_sets(hashes: Hashes, offsets: Indices) -> Hashes:
    """Returns a key for each whole set, uint64 (N,): equal for equal sets, 0 for an empty one."""
    sums = np.zeros(len(hashes) + 1, np.uint64)
    np.cumsum(mix_bits(hashes + _BAND_BASE), out=sums[1:])
    lengths = np.diff(offsets)
    return np.where(lengths > 0, mix_bits(sums[offsets[1:]] - sums[offsets[:-1]] + lengths.astype(np.uint64)), 0)


def find_equal_sets(set_keys: Hashes) -> Indices:
    """Returns for each row the first row with an equal set, itself if there is none, int64 (N,).

    Exact copies can fill a bucket with as many rows as the corpus has copies of a sentence. They are joined to their
    first row directly, and only that one is compared with others. Empty sets equal nothing.
    """
    order = np.argsort(set_keys, kind="stable")
    ordered = set_keys[order]
    leading = np.ones(len(ordered), np.bool_)
    leading[1:] = (ordered[1:] != ordered[:-1]) | (ordered[1:] == 0)
    firsts = np.empty(len(ordered), np.int64)
    firsts[order] = order[np.maximum.accumulate(np.where(leading, np.arange(len(ordered)), 0))]
    return firsts


def hash_bands(signatures: Signatures, num_bands: int) -> Hashes:
    """Returns one key for each band of each signature, uint64 (N, num_bands); keys of different bands do not meet.

    Raises:
        InputError: ``num_bands`` does not divide the length of a signature.
    """
    num_rows, num_permutations = signatures.shape
    if num_bands < 1 or num_permutations % num_bands:
        raise InputError(f"bands: num_bands is {num_bands}, must divide the {num_permutations} values of a signature")
    bands = signatures.reshape(num_rows, num_bands, num_permutations // num_bands)
    keys = np.broadcast_to(np.arange(1, num_bands + 1, dtype=np.uint64), (num_rows, num_bands))
    for place in range(bands.shape[2]):
        keys = mix_bits(keys * _BAND_BASE + bands[:, :, place])
    return keys


def partition_keys(keys: Hashes, rows: Indices, num_partitions: int) -> list[bytes]:
    """Packs the keys of a batch for a grouping by partition.

    Args:
        keys: uint64 (N, B), see :func:`hash_bands`.
        rows: number of each reference in the corpus (N,), not negative.
        num_partitions: how many, 1..65536.

    Returns:
        For each partition its pairs of key and row, little-endian 64-bit integers one after the other. All rows of one
        key are in the same partition.

    Raises:
        InputError: ``num_partitions`` is out of bounds.
    """
    if not 1 <= num_partitions <= 1 << 16:
        raise InputError(f"partitions: num_partitions is {num_partitions}, must be 1..65536")
    partitions = (keys % np.uint64(num_partitions)).astype(np.uint16).ravel()
    order = np.argsort(partitions, kind="stable")
    packed = np.empty((keys.size, 2), _PACKED)
    packed[:, 0] = keys.ravel()[order]
    packed[:, 1] = np.repeat(rows, keys.shape[1])[order]
    ends = np.searchsorted(partitions[order], np.arange(num_partitions), side="right")
    return [part.tobytes() for part in np.split(packed, ends[:-1])]


def unpack_keys(packed: bytes) -> tuple[Hashes, Indices]:
    """Returns the keys uint64 (E,) and rows int64 (E,) of a partition, or of several parts of it joined together."""
    columns = np.frombuffer(packed, _PACKED).reshape(-1, 2)
    return columns[:, 0].astype(np.uint64), columns[:, 1].astype(np.int64)


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
        keys: uint64 (E,).
        rows: int64 (E,), each below 2**32; a key and row that come twice count once.
        max_bucket: at least 2.

    Returns:
        Distinct pairs int64 (P, 2), left < right, ascending, and the number of pairs left out, over all buckets.

    Raises:
        InputError: ``max_bucket`` is below 2, or a row is out of bounds.
    """
    if max_bucket < 2:
        raise InputError(f"candidates: max_bucket is {max_bucket}, must be at least 2")
    if len(rows) and not 0 <= rows.min() <= rows.max() < 1 << 32:
        raise InputError(f"candidates: rows are {rows.min()}..{rows.max()}, must be 0..{(1 << 32) - 1}")
    keys, rows = _select_shared(keys, rows)
    starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])) if len(keys) else np.empty(0, np.int64)
    sizes = np.diff(np.append(starts, len(keys)))
    size_of_row = np.repeat(sizes, sizes)
    followers = size_of_row - 1 - (np.arange(len(keys)) - np.repeat(starts, sizes))
    num_pairs = int((sizes * (sizes - 1) // 2).sum())
    limited = np.where(size_of_row > max_bucket, np.minimum(followers, max_bucket // 2), followers)
    limited[starts] = followers[starts]
    codes = _pair_followers(rows.astype(np.uint64), limited)
    pairs = np.stack([codes >> _ROW_BITS, codes & np.uint64((1 << 32) - 1)], axis=1).astype(np.int64)
    return pairs, num_pairs - int(limited.sum())


def _select_shared(keys: Hashes, rows: Indices) -> tuple[Hashes, Indices]:
    """Returns the distinct (key, row) whose key has several rows, ascending: few, so the full sort is by key only."""
    order = np.argsort(keys)
    ordered = keys[order]
    equal = ordered[1:] == ordered[:-1]
    shared = np.zeros(len(keys), np.bool_)
    shared[1:] = equal
    shared[:-1] |= equal
    keys, rows = ordered[shared], rows[order[shared]]
    order = np.lexsort((rows, keys))
    keys, rows = keys[order], rows[order]
    distinct = np.ones(len(keys), np.bool_)
    distinct[1:] = (keys[1:] != keys[:-1]) | (rows[1:] != rows[:-1])
    return keys[distinct], rows[distinct]


def _pair_followers(rows: Hashes, num_followers: Indices) -> Hashes:
    """Pairs each row with the rows after it; returns distinct pairs as ``left << 32 | right``, ascending."""
    ends = np.cumsum(num_followers)
    codes = np.empty(0, np.uint64)
    start = 0
    while start < len(rows):
        limit = ends[start] - num_followers[start] + _PAIRS_PER_RUN
        end = max(start + 1, int(np.searchsorted(ends, limit, side="right")))
        counts = num_followers[start:end]
        left = np.repeat(np.arange(start, end), counts)
        right = left + 1 + np.arange(len(left)) - np.repeat(np.cumsum(counts) - counts, counts)
        codes = np.union1d(codes, (rows[left] << _ROW_BITS) | rows[right])
        start = end
    return codes


def verify_pairs(pairs: Indices, hashes: Hashes, offsets: Indices) -> Jaccards:
    """Returns the exact Jaccard similarity of the shingle sets of each pair, float64 (P,); of two empty sets it is 0.

    Args:
        pairs: rows int64 (P, 2).
        hashes: the sets of all rows, ascending and unique in each, see :func:`pipelines.shingling.shingle_texts`; may
            be mapped from a file, since only the rows of a tile of pairs are looked at.
        offsets: their offsets (N+1,).
    """
    lengths = np.diff(offsets)
    left, right = pairs[:, 0], pairs[:, 1]
    totals = lengths[left] + lengths[right]
    jaccards = np.zeros(len(pairs), np.float64)
    for chosen in iterate_tiles(totals):
        num_left = lengths[left[chosen], None]
        # Both sets on one line; a short line repeats its last hash. The distinct hashes on it are the union.
        columns = np.minimum(np.arange(totals[chosen[-1]]), totals[chosen, None] - 1)
        base = np.where(columns < num_left, offsets[left[chosen], None], offsets[right[chosen], None] - num_left)
        tile = np.sort(hashes[base + columns], axis=1)
        union = 1 + np.count_nonzero(tile[:, 1:] != tile[:, :-1], axis=1)
        jaccards[chosen] = (totals[chosen] - union) / union
    return jaccards
