"""Shingles against a slow reference: words by character names and a regular expression, hashes by whole numbers."""

import itertools
import re
import unicodedata
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.shingling import iterate_tiles, shingle_texts
from schemas.errors import InputError

MASK = (1 << 64) - 1

NAMES_OF_SPACELESS = (
    *(
        "CJK UNIFIED IDEOGRAPH",
        "CJK COMPATIBILITY IDEOGRAPH",
        "IDEOGRAPHIC",
        "VERTICAL IDEOGRAPHIC",
        "HANGZHOU",
        "MASU",
    ),
    *("HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "VERTICAL KANA", "HENTAIGANA"),
    *("THAI ", "LAO ", "KHMER ", "MYANMAR ", "TAI LE", "NEW TAI LUE", "TAI THAM", "TAI VIET"),
)

PIECES = [
    *("word", "Straße", "İstanbul", "ΣΊΣΥΦΟΣ", "don't", "snake_case", "3.14", "x²", "①", "ﬁn", "__init__", "ǅ"),
    *(
        "中文没有空格",
        "〇々",
        "㐀",
        "𠀀",
        "ひらがな",
        "カタカナー",
        "が",
        "か\u3099",
        "ﾊﾟ",
        "한국어 낱말",
        "\u1112\u1161\u11ab",
    ),
    *("ไม่มีช่องว่าง", "๑๒", "ພາສາລາວ", "ភាសាខ្មែរ", "မြန်မာ", "हिन्दी में", "क्\u200dष", "می\u200cخواهم", "e\u0301", "שָׁלוֹם"),
    *("❤\ufe0f", "1\ufe0f\u20e3", "葛\U000e0100", "\u0301", "\u200d", "👩\u200d💻", "\ufeff", "\u200b", "\0", "\ud800"),
    *(" ", "\n", "\u3000", "\t\r\n", ".", "、", "|", "-----", "+", "—", "a", "b", "a b a b a b a b a b a b"),
]

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

mixed_texts = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=30).map("".join),
    st.lists(st.sampled_from(PIECES), max_size=30).map(" ".join),
    st.text(max_size=40),
)


def name_kind(character: str) -> str:
    category = unicodedata.category(character)
    if category[0] == "M" or character in "\u200c\u200d":
        return "m"
    spaceless = unicodedata.name(character, "").startswith(NAMES_OF_SPACELESS)
    if spaceless and (category[0] == "L" or category == "Nl"):
        return "s"
    return "w" if category[0] in "LN" or character == "_" else "-"


def list_words(text: str) -> list[str]:
    folded = unicodedata.normalize("NFC", text.casefold())
    kinds = "".join(map(name_kind, folded))
    words = [folded[match.start() : match.end()] for match in re.finditer("sm*|w[wm]*", kinds)]
    return words or [character for character in folded if not character.isspace()]


def list_shingles(text: str, num_words: int) -> set[tuple[str, ...]]:
    words = list_words(text)
    if len(words) < num_words:
        return {tuple(words)} if words else set()
    return {tuple(words[start : start + num_words]) for start in range(len(words) - num_words + 1)}


def mix(value: int) -> int:
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        value = (value ^ value >> 33) * multiplier & MASK
    return value ^ value >> 33


def hash_shingle(words: tuple[str, ...]) -> int:
    value = len(words)
    for word in words:
        polynomial = sum(ord(letter) * pow(0x9E3779B97F4A7C15, place, 1 << 64) for place, letter in enumerate(word))
        value = (value * 0xD1B54A32D192ED03 + mix(polynomial & MASK)) & MASK
    return mix(value)


def expect_hashes(texts: list[str], num_words: int) -> list[list[int]]:
    return [sorted({hash_shingle(shingle) for shingle in list_shingles(text, num_words)}) for text in texts]


def compute_hashes(texts: list[str], num_words: int) -> list[list[int]]:
    hashes, offsets = shingle_texts(texts, num_words)
    assert hashes.dtype == np.uint64
    assert offsets.dtype == np.int64
    assert len(offsets) == len(texts) + 1
    assert offsets[-1] == len(hashes)
    return [hashes[start:end].tolist() for start, end in itertools.pairwise(offsets)]


@settings(max_examples=300, deadline=None)
@given(st.lists(mixed_texts, max_size=8), st.integers(1, 7))
def test_mixed_scripts_equal_the_reference(texts: list[str], num_words: int) -> None:
    assert compute_hashes(texts, num_words) == expect_hashes(texts, num_words)


def test_real_text_equals_the_reference() -> None:
    paragraphs = [paragraph for name in sorted(topics)[:12] for paragraph in topics[name].split("\n\n")]
    assert len(paragraphs) > 200
    assert compute_hashes(paragraphs, 5) == expect_hashes(paragraphs, 5)


def test_every_character_is_classified_as_the_reference_does() -> None:
    codes = [*range(0xD800), *range(0xE000, 0x10000), *range(0x10000, 0x110000, 97), *range(0x1B000, 0x1B170)]
    texts = [f"a{chr(code)}b" for code in codes]
    hashes, offsets = shingle_texts(texts, 9)
    single = np.array([hash_shingle(tuple(list_words(text))) for text in texts], np.uint64)
    assert np.array_equal(offsets, np.arange(len(texts) + 1))
    assert np.array_equal(hashes, single)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't STOP, snake_case2!", ["don", "t", "stop", "snake_case2"]),
        ("第3条和ABC", ["第", "3", "条", "和", "abc"]),
        ("カタ カー", ["カ", "タ", "カ", "ー"]),
        ("한국어 낱말", ["한국어", "낱말"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),
        ("❤\ufe0fabc", ["abc"]),
        ("| - | - |", ["|", "-", "|", "-", "|"]),
    ],
)
def test_words_are_those_a_reader_expects(text: str, words: list[str]) -> None:
    assert list_words(text) == words
    assert compute_hashes([text], 9) == [[hash_shingle(tuple(words))]]


def test_hash_of_a_shingle_never_changes() -> None:
    hashes, offsets = shingle_texts(["Memory is a sparse subset of the key-values", "显式记忆", "---"], 5)
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


def test_num_words_is_checked() -> None:
    with pytest.raises(InputError, match="num_words is 0, must be at least 1"):
        shingle_texts(["a"], 0)


@given(st.lists(st.integers(0, 300), max_size=200), st.integers(1, 1000))
def test_tiles_hold_every_row_once_within_the_bound(lengths: list[int], max_items: int) -> None:
    tiles = list(iterate_tiles(np.array(lengths, np.int64), max_items))
    rows = [row for tile in tiles for row in tile.tolist()]
    assert sorted(rows) == [row for row, length in enumerate(lengths) if length]
    for tile in tiles:
        longest = max(lengths[row] for row in tile)
        assert lengths[tile[-1]] == longest
        assert len(tile) == 1 or len(tile) * longest <= max_items
