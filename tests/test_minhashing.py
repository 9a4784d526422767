"""Signatures against datasketch itself, bit for bit."""

import itertools
from pydoc_data.topics import topics

import numpy as np
import pytest
from datasketch import LeanMinHash, MinHash
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.minhashing import EMPTY_VALUE, Signatures, sign
from pipelines.shingling import Hashes, Indices, shingle_texts
from schemas.errors import InputError


def sign_with_datasketch(hashes: Hashes, num_permutations: int, seed: int) -> Signatures:
    minhash = MinHash(num_permutations, seed=seed, scheme="affine32", hashfunc=lambda value: value)
    minhash.update_batch([value & 0xFFFFFFFF for value in hashes.tolist()])
    return np.asarray(minhash.hashvalues, dtype=np.uint32)


def join_sets(sets: list[list[int]]) -> tuple[Hashes, Indices]:
    offsets = np.zeros(len(sets) + 1, np.int64)
    np.cumsum([len(values) for values in sets], out=offsets[1:])
    return np.array([value for values in sets for value in values], np.uint64), offsets


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, (1 << 64) - 1), max_size=40), max_size=12),
    st.integers(1, 140),
    st.integers(0, (1 << 32) - 1),
)
def test_signatures_equal_datasketch(sets: list[list[int]], num_permutations: int, seed: int) -> None:
    hashes, offsets = join_sets(sets)
    signatures = sign(hashes, offsets, num_permutations, seed)
    assert signatures.dtype == np.uint32
    assert signatures.shape == (len(sets), num_permutations)
    for row, values in zip(signatures, sets, strict=True):
        assert np.array_equal(row, sign_with_datasketch(np.array(values, np.uint64), num_permutations, seed))


def test_sets_beyond_a_tile_equal_datasketch() -> None:
    generator = np.random.default_rng(5)
    sets = [generator.integers(0, 1 << 64, size, dtype=np.uint64).tolist() for size in (3, 90_000, 1, 70_000)]
    hashes, offsets = join_sets(sets)
    signatures = sign(hashes, offsets, 16, 1)
    for row, values in zip(signatures, sets, strict=True):
        assert np.array_equal(row, sign_with_datasketch(np.array(values, np.uint64), 16, 1))


def test_datasketch_reads_the_rows_of_real_texts() -> None:
    texts = [topics[name] for name in sorted(topics)[:8]]
    texts.append(texts[0].replace("the", "this"))
    hashes, offsets = shingle_texts(texts, 5)
    signatures = sign(hashes, offsets, 128, 7)
    read = [LeanMinHash(hashvalues=row, scheme="affine32", seed=7) for row in signatures]
    sets = [set(hashes[start:end].tolist()) for start, end in itertools.pairwise(offsets)]
    similar = len(sets[0] & sets[8]) / len(sets[0] | sets[8])
    assert 0.2 < similar < 0.95
    assert read[0].jaccard(read[8]) == (signatures[0] == signatures[8]).mean()
    # Five standard deviations of 128 trials.
    assert abs(read[0].jaccard(read[8]) - similar) < 5 * (similar * (1 - similar) / 128) ** 0.5
    assert read[0].jaccard(read[1]) < 0.1
    built = MinHash(128, seed=7, scheme="affine32", hashfunc=lambda value: value)
    for value in sets[0]:
        built.update(value & 0xFFFFFFFF)
    assert LeanMinHash(built) == read[0]


def test_the_empty_set_has_the_highest_values() -> None:
    signatures = sign(np.array([9], np.uint64), np.array([0, 0, 1, 1]), 4, 1)
    assert (signatures[[0, 2]] == EMPTY_VALUE).all()
    assert MinHash(4, scheme="affine32").hashvalues.tolist() == signatures[0].tolist()
    assert (signatures[1] != EMPTY_VALUE).any()


@pytest.mark.parametrize(
    ("num_permutations", "seed", "message"),
    [(0, 1, "num_permutations is 0, must be at least 1"), (8, -1, "seed is -1, must be"), (8, 1 << 32, "must be 0..")],
)
def test_values_are_checked(num_permutations: int, seed: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sign(np.array([9], np.uint64), np.array([0, 1]), num_permutations, seed)
