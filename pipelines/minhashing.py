"""MinHash signatures of shingle sets: the second step of near-duplicate removal.

    texts -> shingles -> **signatures** -> candidate pairs -> verified pairs -> duplicates

Two rows agree at a position with a probability equal to the Jaccard similarity of their sets. The values are those of
datasketch 2.0's scheme ``affine32``, bit for bit, so that stored signatures can be read with that library::

    LeanMinHash(hashvalues=row, scheme="affine32", seed=seed)
"""

import numpy as np

from pipelines.shingling import Hashes, Indices, iterate_tiles
from schemas.errors import InputError

Signatures = np.ndarray[tuple[int, ...], np.dtype[np.uint32]]

EMPTY_VALUE = 0xFFFFFFFF
"""Every value of the signature of an empty set."""


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


def sign(hashes: Hashes, offsets: Indices, num_permutations: int, seed: int) -> Signatures:
    """Returns the MinHash signature of each set, uint32 (N, num_permutations).

    Only the low 32 bits of the hashes count. Work goes by tiles of some hundred thousand hashes, or of the largest set
    if that is more.

    Args:
        hashes: the sets one after the other, see :func:`pipelines.shingling.shingle_texts`.
        offsets: their offsets (N+1,).
        num_permutations: length of a signature.
        seed: seed of the permutations; signatures of different seeds cannot be compared.

    Raises:
        InputError: a value out of bounds.
    """
    factors, summands = draw_permutations(num_permutations, seed)
    lengths = np.diff(offsets)
    signatures = np.full((len(lengths), num_permutations), EMPTY_VALUE, np.uint32)
    for rows in iterate_tiles(lengths):
        # One column a set, so that the minimum goes along contiguous lines; a short set repeats its last hash.
        steps = np.minimum(np.arange(lengths[rows[-1]])[:, None], lengths[rows] - 1)
        mixed = _mix_bits_32(hashes[offsets[rows] + steps].astype(np.uint32))
        permuted = np.empty_like(mixed)
        minima = np.empty((num_permutations, len(rows)), np.uint32)
        for factor, summand, minimum in zip(factors, summands, minima, strict=True):
            np.multiply(mixed, factor, out=permuted)
            permuted += summand
            permuted.min(axis=0, out=minimum)
        signatures[rows] = minima.T
    return signatures


def _mix_bits_32(values: Signatures) -> Signatures:
    """MurmurHash3's finaliser for 32 bits, which datasketch applies before the permutations."""
    values ^= values >> np.uint32(16)
    values *= np.uint32(0x85EBCA6B)
    values ^= values >> np.uint32(13)
    values *= np.uint32(0xC2B2AE35)
    values ^= values >> np.uint32(16)
    return values
