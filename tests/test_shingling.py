"""Shingle sets against a slow reference with tuples, sets and whole numbers."""

import itertools
import unicodedata
from pydoc_data.topics import topics

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.shingling import _sort_unique, hash_windows, shingle_texts
from schemas.errors import InputError
from tests.test_words import MASK, hash_word, list_words, mix, mixed_texts

GOLDEN_OFFSETS = [0, 5, 6, 7]
GOLDEN_HASHES = [
    "3f929aeb3445d649",
    "4087016ab50621d4",
    "8b78b39577960e17",
    "942847f19de3ba23",
    "9886e322535c4c84",
    "513eecc06fabb78e",
    "a83ade323b96c3ce",
]


def list_windows(words: list[str], num_words: int) -> list[tuple[str, ...]]:
    if len(words) < num_words:
        return [tuple(words)] if words else []
    return [tuple(words[start : start + num_words]) for start in range(len(words) - num_words + 1)]


def hash_shingle(words: tuple[str, ...]) -> int:
    value = len(words)
    for word in words:
        value = (value * 0xD1B54A32D192ED03 + hash_word(word)) & MASK
    return mix(value)


def expect_hashes(texts: list[str], num_words: int) -> list[list[int]]:
    return [sorted({hash_shingle(window) for window in list_windows(list_words(text), num_words)}) for text in texts]


def compute_hashes(texts: list[str], num_words: int) -> list[list[int]]:
    hashes, offsets = shingle_texts(pa.array(texts, pa.string()), num_words)
    assert hashes.dtype == np.uint64
    assert offsets.dtype == np.int64
    assert len(offsets) == len(texts) + 1
    assert offsets[-1] == len(hashes)
    return [hashes[start:end].tolist() for start, end in itertools.pairwise(offsets)]


@settings(max_examples=300)
@given(st.lists(mixed_texts, max_size=8), st.integers(1, 7))
def test_mixed_scripts_equal_the_reference(texts: list[str], num_words: int) -> None:
    assert compute_hashes(texts, num_words) == expect_hashes(texts, num_words)


@pytest.mark.parametrize("num_words", [1, 5])
def test_real_text_equals_the_reference(num_words: int) -> None:
    paragraphs = [paragraph for name in sorted(topics)[:12] for paragraph in topics[name].split("\n\n")]
    assert len(paragraphs) > 200
    texts = [*paragraphs, *(topics[name] for name in sorted(topics)[:12])]
    assert compute_hashes(texts, num_words) == expect_hashes(texts, num_words)


def test_hash_of_a_shingle_never_changes() -> None:
    texts = ["Memory is a sparse subset of the key-values", "显式记忆", "---"]
    hashes, offsets = shingle_texts(pa.array(texts), 5)
    assert offsets.tolist() == GOLDEN_OFFSETS
    assert [f"{value:016x}" for value in hashes.tolist()] == GOLDEN_HASHES


def test_batch_and_place_in_it_do_not_matter() -> None:
    long_text = " ".join(f"word{number} 字" for number in range(60_000))
    texts = ["before it", long_text, "", "中文 and after it", long_text[:5000]]
    together = compute_hashes(texts, 3)
    assert len(long_text) > 1 << 19
    assert together == [compute_hashes([text], 3)[0] for text in texts]
    assert together[4] == expect_hashes(texts[4:], 3)[0]
    assert set(together[4][:-1]) & set(together[1])


def test_case_and_normal_form_do_not_matter() -> None:
    composed, decomposed = "Café Größe が 한국", unicodedata.normalize("NFD", "CAFÉ GRÖSSE が 한국")
    assert compute_hashes([composed], 2) == compute_hashes([decomposed], 2)


def test_only_blank_texts_are_empty() -> None:
    counts = [len(hashes) for hashes in compute_hashes(["", " \n\u3000", ".", "a", "a a a a a a a a", "\u200b"], 5)]
    assert counts == [0, 0, 1, 1, 1, 1]
    assert compute_hashes([], 5) == []


@given(st.lists(st.integers(0, MASK), min_size=1, max_size=30), st.integers(1, 40), st.data())
def test_windows_of_a_part_are_those_of_the_part_alone(words: list[int], num_words: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(words) - 1))
    end = data.draw(st.integers(start + 1, len(words)))
    size = min(num_words, end - start)
    expected = []
    for first in range(start, end - size + 1):
        value = size
        for word in words[first : first + size]:
            value = (value * 0xD1B54A32D192ED03 + word) & MASK
        expected.append(mix(value))
    hashes = np.zeros(len(words), np.uint64)
    assert hash_windows(np.array(words, np.uint64), start, end, num_words, hashes) == len(expected)
    assert hashes[: len(expected)].tolist() == expected


@given(
    st.lists(st.one_of(st.integers(0, 5), st.integers(0, MASK), st.integers(MASK - 5, MASK)), min_size=1, max_size=200),
    st.integers(0, 3),
)
def test_sorting_drops_repetitions_however_the_values_lie(values: list[int], start: int) -> None:
    hashes = np.full(start + len(values), 7, np.uint64)
    end = _sort_unique(np.array(values, np.uint64), np.ones(2 * len(values) + 2, np.int32), hashes, start)
    assert hashes[start:end].tolist() == sorted(set(values))
    assert (hashes[:start] == 7).all()


def test_sorting_many_values() -> None:
    values = np.random.default_rng(3).integers(0, 1 << 64, 100_000, dtype=np.uint64)
    values[1::3] = values[: len(values[1::3])]
    values[2::3] |= np.uint64(0xFF << 56)  # a third of all values in the last buckets
    hashes = np.empty(len(values), np.uint64)
    end = _sort_unique(values, np.empty(2 * len(values) + 2, np.int32), hashes, 0)
    assert np.array_equal(hashes[:end], np.unique(values))


def test_values_are_checked() -> None:
    with pytest.raises(InputError, match="num_words is 0, must be at least 1"):
        shingle_texts(pa.array(["a"]), 0)
    with pytest.raises(InputError, match="texts are int64, must be strings"):
        shingle_texts(pa.array([1]), 5)
