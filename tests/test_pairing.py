"""Bands, candidate pairs and exact similarities against dictionaries and sets."""

import itertools
import random
from collections import defaultdict
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import pairing
from pipelines.minhashing import sign_texts
from pipelines.pairing import (
    find_equal_keys,
    hash_bands,
    list_candidate_pairs,
    unite_pairs,
    verify_across,
    verify_pairs,
)
from pipelines.shingling import shingle_texts
from pipelines.words import Hashes, Indices
from schemas.errors import InputError
from tests.test_words import MASK, mix

Entries = list[tuple[int, int]]

keys_of_few = st.one_of(st.integers(0, 9), st.sampled_from([MASK, MASK - 1, 1 << 63, 0x9E3779B97F4A7C15]))
some_entries = st.lists(st.tuples(keys_of_few, st.integers(0, 40)), max_size=120)
small_sets = st.lists(st.sets(st.one_of(st.integers(0, 12), st.just(MASK)), max_size=8), min_size=1, max_size=12)


def join_sets(sets: list[set[int]]) -> tuple[Hashes, Indices]:
    offsets = np.zeros(len(sets) + 1, np.int64)
    np.cumsum([len(values) for values in sets], out=offsets[1:])
    return np.array([value for values in sets for value in sorted(values)], np.uint64), offsets


def measure(left: set[int], right: set[int]) -> float:
    return len(left & right) / len(left | right) if left | right else 0.0


def split_entries(entries: Entries) -> tuple[Hashes, Indices]:
    return np.array([key for key, _ in entries], np.uint64), np.array([row for _, row in entries], np.int64)


def list_slowly(entries: Entries, max_bucket: int) -> tuple[list[tuple[int, int]], int]:
    buckets: dict[int, list[int]] = defaultdict(list)
    for key, row in sorted(set(entries)):
        buckets[key].append(row)
    pairs, num_left_out = set(), 0
    for rows in buckets.values():
        reach = max_bucket // 2 if len(rows) > max_bucket else len(rows)
        for left, right in itertools.combinations(range(len(rows)), 2):
            if left == 0 or right - left <= reach:
                pairs.add((rows[left], rows[right]))
            else:
                num_left_out += 1
    return sorted(pairs), num_left_out


def check_candidates(entries: Entries, max_bucket: int) -> None:
    pairs, num_left_out = list_candidate_pairs(*split_entries(entries), max_bucket)
    assert pairs.dtype == np.int64
    assert pairs.shape == (len(pairs), 2)
    assert ([(left, right) for left, right in pairs.tolist()], num_left_out) == list_slowly(entries, max_bucket)
    assert len(pairs) <= len(entries) * (max_bucket // 2 + 1)


@given(st.lists(keys_of_few, max_size=60))
def test_the_first_of_equal_keys_is_found(keys: list[int]) -> None:
    firsts = find_equal_keys(np.array(keys, np.uint64))
    assert firsts.dtype == np.int64
    assert firsts.tolist() == [keys.index(key) if key else row for row, key in enumerate(keys)]


def test_the_first_of_many_equal_keys_is_found() -> None:
    keys = np.random.default_rng(1).integers(0, 5000, 20_000).astype(np.uint64) * np.uint64(1 << 40)
    values, places = np.unique(keys, return_index=True)
    expected = places[np.searchsorted(values, keys)]
    expected[keys == 0] = np.flatnonzero(keys == 0)
    assert np.array_equal(find_equal_keys(keys), expected)


def test_keys_that_meet_at_the_end_of_the_table_go_on_at_its_beginning() -> None:
    inverse = pow(0x9E3779B97F4A7C15, -1, 1 << 64)
    keys = [(MASK - number) * inverse & MASK for number in (0, 1, 2, 1, 0, 3, 2)]
    assert find_equal_keys(np.array(keys, np.uint64)).tolist() == [0, 1, 2, 1, 0, 5, 2]


@settings(max_examples=50)
@given(st.integers(0, 20), st.integers(1, 6), st.integers(1, 6), st.integers(0, MASK))
def test_band_keys_equal_the_reference(num_rows: int, num_bands: int, size: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    signatures = generator.integers(0, 1 << 32, (num_rows, num_bands * size), dtype=np.uint32)
    expected = []
    for row in signatures.tolist():
        for band in range(num_bands):
            key = band + 1
            for value in row[band * size : (band + 1) * size]:
                key = mix((key * 0x9E3779B97F4A7C15 + value) & MASK)
            expected.append(key)
    keys = hash_bands(signatures, num_bands)
    assert keys.shape == (num_rows, num_bands)
    assert keys.ravel().tolist() == expected


def test_rows_share_a_band_key_exactly_if_they_agree_in_the_band() -> None:
    signatures = np.random.default_rng(4).integers(0, 2, (200, 12)).astype(np.uint32)
    signatures[:, 3:6] = signatures[:, :3]  # two bands of equal values still have different keys
    keys = hash_bands(signatures, 4)
    bands = [(band, *signatures[row, 3 * band : 3 * band + 3].tolist()) for row in range(200) for band in range(4)]
    assert len(set(zip(bands, keys.ravel().tolist(), strict=True))) == len(set(bands)) == len(np.unique(keys))


def test_band_keys_do_not_depend_on_how_signatures_are_stored() -> None:
    signatures = np.random.default_rng(5).integers(0, 1 << 32, (30, 12), dtype=np.uint32)
    frozen = signatures.copy()
    frozen.flags.writeable = False
    for stored in (frozen, np.asfortranarray(signatures), np.repeat(signatures, 2, axis=0)[::2]):
        assert np.array_equal(hash_bands(stored, 4), hash_bands(signatures, 4))


@settings(max_examples=200)
@given(some_entries, st.integers(2, 12))
def test_candidates_are_the_pairs_that_share_a_key(entries: Entries, max_bucket: int) -> None:
    check_candidates(entries, max_bucket)
    check_candidates(entries, 256)


def test_candidates_of_many_keys_in_any_order() -> None:
    generator = random.Random(2)
    entries = [(generator.randrange(4000) << 30, generator.randrange(3000)) for _ in range(6000)]
    entries += [(generator.getrandbits(64), generator.randrange(3000)) for _ in range(6000)]
    assert len(list_slowly(entries, 256)[0]) > 4000
    check_candidates(entries, 256)
    check_candidates(sorted(entries, key=lambda entry: entry[1]), 256)


def test_a_bucket_of_thousands_of_rows_in_any_order() -> None:
    generator = random.Random(3)
    entries = [(key, row) for key in (5, 6, MASK) for row in generator.sample(range(1 << 32), 1500)]
    generator.shuffle(entries)
    check_candidates(entries + entries[:500], 16)


def test_candidates_do_not_depend_on_the_size_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(4)
    entries = [(generator.randrange(50), generator.randrange(200)) for _ in range(600)]
    expected = list_candidate_pairs(*split_entries(entries), 8)
    for size in (1, 7, 500):
        monkeypatch.setattr(pairing, "_PAIRS_PER_RUN", size)
        pairs, num_left_out = list_candidate_pairs(*split_entries(entries), 8)
        assert np.array_equal(pairs, expected[0])
        assert num_left_out == expected[1] > 0


@given(st.lists(some_entries, max_size=4))
def test_united_pairs_are_those_of_all_bands_at_once(bands: list[Entries]) -> None:
    # Keys of different bands never meet.
    apart = [(key // 16 * 16 + band, row) for band, entries in enumerate(bands) for key, row in entries]
    parts = [
        list_candidate_pairs(*split_entries([entry for entry in apart if entry[0] % 16 == band]))[0]
        for band in range(len(bands))
    ]
    united = unite_pairs(parts)
    assert united.dtype == np.int64
    assert np.array_equal(united, list_candidate_pairs(*split_entries(apart))[0])


@given(small_sets, st.data())
def test_jaccard_is_that_of_the_sets(sets: list[set[int]], data: st.DataObject) -> None:
    row = st.integers(0, len(sets) - 1)
    pairs = data.draw(st.lists(st.tuples(row, row), max_size=20))
    jaccards = verify_pairs(np.array(pairs, np.int64).reshape(-1, 2), *join_sets(sets))
    assert jaccards.dtype == np.float64
    assert jaccards.tolist() == [measure(sets[left], sets[right]) for left, right in pairs]


@given(small_sets, small_sets)
def test_jaccard_across_two_collections(left: list[set[int]], right: list[set[int]]) -> None:
    pairs = np.array(list(itertools.product(range(len(left)), range(len(right)))), np.int64)
    jaccards = verify_across(pairs, *join_sets(left), *join_sets(right))
    assert jaccards.tolist() == [measure(left[row], right[column]) for row, column in pairs.tolist()]


def test_jaccard_of_large_sets_and_of_mapped_ones(tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    sets = [set(generator.integers(0, 150_000, size).tolist()) for size in (90_000, 5, 60_000, 0)]
    pairs = np.array(list(itertools.product(range(4), repeat=2)), np.int64)
    hashes, offsets = join_sets(sets)
    expected = [measure(sets[left], sets[right]) for left, right in pairs.tolist()]
    assert verify_pairs(pairs, hashes, offsets).tolist() == expected
    for name, array in (("hashes", hashes), ("offsets", offsets), ("pairs", pairs)):
        np.save(tmp_path / name, array)
    mapped_pairs, mapped_hashes, mapped_offsets = (
        np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("pairs", "hashes", "offsets")
    )
    assert verify_pairs(mapped_pairs, mapped_hashes, mapped_offsets).tolist() == expected
    across = verify_across(np.asfortranarray(pairs), mapped_hashes, mapped_offsets, hashes, offsets)
    assert across.tolist() == expected


def test_candidates_of_real_text_are_its_similar_pairs() -> None:
    paragraphs = sorted({paragraph for text in topics.values() for paragraph in text.split("\n\n")}, key=len)[-300:]
    edited = [paragraph.replace("the", "this", 1) for paragraph in paragraphs]
    texts = pa.array([*paragraphs, *edited, paragraphs[7].upper()])
    signed = sign_texts(texts, 5, 120, 1)
    firsts = find_equal_keys(signed.sequence_keys)
    assert firsts[-1] == 7
    keys = hash_bands(signed.signatures, 24)
    pairs, _ = list_candidate_pairs(keys.ravel(), np.repeat(np.arange(len(texts)), 24))
    by_band = [list_candidate_pairs(np.ascontiguousarray(band), np.arange(len(texts)))[0] for band in keys.T]
    assert np.array_equal(pairs, unite_pairs(by_band))
    hashes, offsets = shingle_texts(texts, 5)
    sets = [set(hashes[start:end].tolist()) for start, end in itertools.pairwise(offsets)]
    assert verify_pairs(pairs, hashes, offsets).tolist() == [measure(sets[a], sets[b]) for a, b in pairs.tolist()]
    similar = {
        pair for pair in itertools.combinations(range(len(sets)), 2) if measure(sets[pair[0]], sets[pair[1]]) >= 0.8
    }
    assert len(similar) > 200
    assert similar <= set(map(tuple, pairs.tolist()))


def test_wrong_columns_are_refused() -> None:
    two = np.zeros(2, np.uint64)
    with pytest.raises(InputError, match="num_bands is 3, must divide the 4 values"):
        hash_bands(np.zeros((1, 4), np.uint32), 3)
    with pytest.raises(InputError, match="num_bands is 0"):
        hash_bands(np.zeros((1, 4), np.uint32), 0)
    with pytest.raises(InputError, match=r"rows are 0\.\.4294967296"):
        list_candidate_pairs(two, np.array([0, 1 << 32]))
    with pytest.raises(InputError, match="2 keys and 3 rows"):
        list_candidate_pairs(two, np.arange(3))
    with pytest.raises(InputError, match="max_bucket is 1, must be at least 2"):
        list_candidate_pairs(two, np.arange(2), 1)


@pytest.mark.parametrize("wrong", [(0, 2), (2, 0), (-1, 0), (0, -1)])
def test_a_pair_without_its_set_is_refused(wrong: tuple[int, int]) -> None:
    hashes, offsets = join_sets([{1}, {1, 2}])
    with pytest.raises(InputError, match=f"pair 1 is {wrong[0]}, {wrong[1]}, but there are 2 left and 2 right sets"):
        verify_pairs(np.array([(0, 1), wrong], np.int64), hashes, offsets)
    for pair in ((0, 1), (1, 0)):
        with pytest.raises(InputError, match=f"pair 0 is {pair[0]}, {pair[1]}, .* sets of 1 and 1 shingles"):
            verify_pairs(np.array([pair]), hashes[:1], offsets)
