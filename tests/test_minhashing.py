"""Signatures against datasketch itself, bit for bit."""

import itertools
from pydoc_data.topics import topics

import numpy as np
import pyarrow as pa
import pytest
from datasketch import LeanMinHash, MinHash
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.minhashing import EMPTY_VALUE, Signatures, SignedTexts, sign_texts
from pipelines.shingling import shingle_texts
from pipelines.words import Hashes
from schemas.errors import InputError
from tests.test_shingling import list_windows
from tests.test_words import MASK, hash_word, list_words, mix, mixed_texts

GOLDEN_SIGNATURE = [354060305, 628080284, 1205807450, 2023268619]
GOLDEN_KEY = "91bbefd6429ad559"


def sign_with_datasketch(hashes: Hashes, num_permutations: int, seed: int) -> Signatures:
    minhash = MinHash(num_permutations, seed=seed, scheme="affine32", hashfunc=lambda value: value)
    minhash.update_batch([value & 0xFFFFFFFF for value in hashes.tolist()])
    return np.asarray(minhash.hashvalues, dtype=np.uint32)


def make_key(text: str) -> int:
    words = list_words(text)
    key = len(words)
    for word in words:
        key = (key ^ hash_word(word)) * 0x9E3779B97F4A7C15 & MASK
        key ^= key >> 32
    return max(mix(key), 1) if words else 0


def check(texts: list[str], signed: SignedTexts, num_words: int, num_permutations: int, seed: int) -> None:
    """Compares every column of signed texts with what datasketch and whole numbers make of them."""
    hashes, offsets = shingle_texts(pa.array(texts, pa.string()), num_words)
    assert signed.signatures.dtype == np.uint32
    assert signed.signatures.shape == (len(texts), num_permutations)
    for row, (start, end) in zip(signed.signatures, itertools.pairwise(offsets), strict=True):
        assert np.array_equal(row, sign_with_datasketch(hashes[start:end], num_permutations, seed))
    assert signed.sequence_keys.dtype == np.uint64
    assert signed.sequence_keys.tolist() == [make_key(text) for text in texts]
    assert signed.num_shingles.dtype == np.int64
    assert signed.num_shingles.tolist() == [len(list_windows(list_words(text), num_words)) for text in texts]


@settings(max_examples=100)
@given(
    st.lists(mixed_texts, max_size=8),
    st.integers(1, 7),
    st.integers(1, 140),
    st.integers(0, (1 << 32) - 1),
)
def test_mixed_scripts_equal_datasketch(texts: list[str], num_words: int, num_permutations: int, seed: int) -> None:
    signed = sign_texts(pa.array(texts, pa.string()), num_words, num_permutations, seed)
    check(texts, signed, num_words, num_permutations, seed)


@pytest.mark.parametrize("num_words", [1, 5, 1500])
def test_texts_longer_than_a_run_equal_datasketch(num_words: int) -> None:
    # Around the numbers of shingles that fill a group and a run; the words differ, so that each shingle counts.
    counts = [1, 7, 8, 9, 1023, 1024, 1025, 2048, 2055]
    texts = [" ".join(f"w{word * count}" for word in range(count + num_words - 1)) for count in counts]
    signed = sign_texts(pa.array(texts), num_words, 24, 1)
    assert signed.num_shingles.tolist() == counts
    check(texts, signed, num_words, 24, 1)


def test_datasketch_reads_the_rows_of_real_texts() -> None:
    texts = [topics[name] for name in sorted(topics)[:8]]
    texts.append(texts[0].replace("the", "this"))
    signed = sign_texts(pa.array(texts), 5, 128, 7)
    check(texts, signed, 5, 128, 7)
    hashes, offsets = shingle_texts(pa.array(texts), 5)
    read = [LeanMinHash(hashvalues=row, scheme="affine32", seed=7) for row in signed.signatures]
    sets = [set(hashes[start:end].tolist()) for start, end in itertools.pairwise(offsets)]
    similar = len(sets[0] & sets[8]) / len(sets[0] | sets[8])
    assert 0.2 < similar < 0.95
    assert read[0].jaccard(read[8]) == (signed.signatures[0] == signed.signatures[8]).mean()
    # Five standard deviations of 128 trials.
    assert abs(read[0].jaccard(read[8]) - similar) < 5 * (similar * (1 - similar) / 128) ** 0.5
    assert read[0].jaccard(read[1]) < 0.1
    built = MinHash(128, seed=7, scheme="affine32", hashfunc=lambda value: value)
    for value in sets[0]:
        built.update(value & 0xFFFFFFFF)
    assert LeanMinHash(built) == read[0]


def test_signatures_never_change() -> None:
    signed = sign_texts(pa.array(["Memory is a sparse subset of the key-values 显式记忆"]), 5, 4, 1)
    assert signed.signatures.tolist() == [GOLDEN_SIGNATURE]
    assert f"{signed.sequence_keys[0]:016x}" == GOLDEN_KEY


def test_a_blank_text_has_the_highest_values() -> None:
    signed = sign_texts(pa.array(["", "a", " \n\u3000", None]), 5, 4, 1)
    assert (signed.signatures[[0, 2, 3]] == EMPTY_VALUE).all()
    assert MinHash(4, scheme="affine32").hashvalues.tolist() == signed.signatures[0].tolist()
    assert (signed.signatures[1] != EMPTY_VALUE).any()
    assert signed.sequence_keys[[0, 2, 3]].tolist() == signed.num_shingles[[0, 2, 3]].tolist() == [0, 0, 0]


@given(st.lists(st.lists(st.sampled_from(["ab", "c", "中"]), max_size=6), max_size=30))
def test_keys_are_equal_exactly_for_equal_sequences_of_words(sequences: list[list[str]]) -> None:
    texts = [" ".join(words) + "." * (row % 2) for row, words in enumerate(sequences) if words]
    keys = sign_texts(pa.array(texts, pa.string()), 5, 1, 1).sequence_keys.tolist()
    assert [keys.index(key) for key in keys] == [list(map(list_words, texts)).index(list_words(text)) for text in texts]


def test_keys_differ_where_those_of_a_polynomial_would_not() -> None:
    # Modulo 2**64 the polynomial of this sequence and of its complement meet, whatever the two words and the factor.
    turns = [number.bit_count() % 2 for number in range(1 << 11)]
    texts = [" ".join("ab"[turn ^ flip] for turn in turns) for flip in (0, 1)]
    first, second = sign_texts(pa.array(texts), 5, 1, 1).sequence_keys.tolist()
    assert first != second


def test_tiles_and_chunks_do_not_matter() -> None:
    texts = [paragraph for name in sorted(topics) for paragraph in topics[name].split("\n\n")]
    assert sum(map(len, texts)) > 400_000
    array = pa.array(texts)
    whole = sign_texts(array, 5, 16, 1)
    parts = [sign_texts(array[start : start + 700], 5, 16, 1) for start in range(0, len(array), 700)]
    chunked = sign_texts(pa.chunked_array([array[:9], array[9:]]), 5, 16, 1)
    for column, part_columns, chunked_column in zip(whole, zip(*parts, strict=True), chunked, strict=True):
        assert np.array_equal(column, np.concatenate(part_columns))
        assert np.array_equal(column, chunked_column)


@pytest.mark.parametrize(
    ("num_words", "num_permutations", "seed", "message"),
    [
        (0, 8, 1, "num_words is 0, must be at least 1"),
        (5, 0, 1, "num_permutations is 0, must be at least 1"),
        (5, 8, -1, "seed is -1, must be"),
        (5, 8, 1 << 32, "must be 0..4294967295"),
    ],
)
def test_values_are_checked(num_words: int, num_permutations: int, seed: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sign_texts(pa.array(["a"]), num_words, num_permutations, seed)
