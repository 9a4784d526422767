"""Words against a slow reference: found by character names and a regular expression, hashed with whole numbers."""

import itertools
import re
import unicodedata
from pydoc_data.topics import topics

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import words as words_module
from pipelines.words import Words, find_words, freeze_array, iterate_words
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
    *(
        "word",
        "Straße",
        "İstanbul",
        "ΣΊΣΥΦΟΣ",
        "don't",
        "snake_case",
        "3.14",
        "x²",
        "①",
        "ﬁn",
        "__init__",
        "ǅ",
        "ǰ",
        "ΐ",
    ),
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
    *(
        "ไม่มีช่องว่าง",
        "๑๒",
        "ພາສາລາວ",
        "ភាសាខ្មែរ",
        "မြန်မာ",
        "हिन्दी में",
        "ड़",
        "क्\u200dष",
        "می\u200cخواهم",
        "e\u0301",
        "שָׁלוֹם",
    ),
    *(
        "❤\ufe0f",
        "1\ufe0f\u20e3",
        "葛\U000e0100",
        "\u0301",
        "\u200d",
        "👩\u200d💻",
        "\ufeff",
        "\u200b",
        "\0",
        "\U0001d160",
    ),
    *(" ", "\n", "\u3000", "\t\r\n", ".", "、", "|", "-----", "+", "—", "a", "b", "a b a b a b a b a b a b"),
    *(
        "\u0345",
        "\u0e38\u0e48",
        "\u0e48\u0e38",
        "\u0316\u0301",
        "\u0301\u0316",
        "a\u0327\u0301",
        "\uf900",
        "\u212b",
        "Ω\u0313",
    ),
]

GOLDEN_HASHES = ["b213af4d71617285", "3650e53446ad0f4b", "8eadef6f7a1a5b56", "ac7840110d6a2541"]

mixed_texts = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=30).map("".join),
    st.lists(st.sampled_from(PIECES), max_size=30).map(" ".join),
    st.text(max_size=40),
    st.text(st.one_of(st.characters(categories=["Mn"]), st.sampled_from("aÅßñ가한ᅡᆫ中ด ")), max_size=12),
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
    """The definition of a word, said in another way than the kernel does."""
    folded = unicodedata.normalize("NFC", text.casefold())
    kinds = "".join(map(name_kind, folded))
    words = [folded[match.start() : match.end()] for match in re.finditer("sm*|w[wm]*", kinds)]
    return words or [character for character in folded if not character.isspace()]


def mix(value: int) -> int:
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        value = (value ^ value >> 33) * multiplier & MASK
    return value ^ value >> 33


def hash_word(word: str) -> int:
    return mix(sum(ord(letter) * pow(0x9E3779B97F4A7C15, place, 1 << 64) for place, letter in enumerate(word)) & MASK)


def expect_words(texts: list[str]) -> list[list[tuple[int, int]]]:
    return [[(hash_word(word), len(word)) for word in list_words(text)] for text in texts]


def unpack(words: Words) -> list[list[tuple[int, int]]]:
    assert words.hashes.dtype == np.uint64
    assert words.num_chars.dtype == np.int32
    assert words.offsets.dtype == np.int64
    assert words.offsets[0] == 0
    assert words.offsets[-1] == len(words.hashes) == len(words.num_chars)
    pairs = list(zip(words.hashes.tolist(), words.num_chars.tolist(), strict=True))
    return [pairs[start:end] for start, end in itertools.pairwise(words.offsets)]


@settings(max_examples=200)
@given(st.lists(mixed_texts, max_size=8))
def test_mixed_scripts_equal_the_reference(texts: list[str]) -> None:
    assert unpack(find_words(pa.array(texts, pa.string()))) == expect_words(texts)


def test_real_text_equals_the_reference() -> None:
    texts = [topics[name] for name in sorted(topics)]
    assert sum(map(len, texts)) > 400_000
    assert unpack(find_words(pa.array(texts))) == expect_words(texts)


def test_every_character_is_found_as_the_reference_does() -> None:
    codes = [*range(0xD800), *range(0xE000, 0x10000), *range(0x10000, 0x110000, 97), *range(0x1B000, 0x1B170)]
    # Beside a capital, so that the text is folded, and after what some characters are joined to by the normal form.
    texts = [text for code in codes for text in (f"A{chr(code)}b{chr(code)}", f"가{chr(code)}")]
    words = find_words(pa.array(texts))
    expected = [list_words(text) for text in texts]
    assert np.array_equal(np.diff(words.offsets), list(map(len, expected)))
    assert words.hashes.tolist() == [hash_word(word) for found in expected for word in found]
    assert words.num_chars.tolist() == [len(word) for found in expected for word in found]


def test_all_pairs_of_marks_are_ordered_and_joined_as_python_does() -> None:
    marks = [chr(code) for code in range(0x110000) if unicodedata.combining(chr(code))]
    classes = {unicodedata.combining(mark): mark for mark in marks}
    texts = [f"e{first}{second}" for first in marks for second in classes.values()]
    assert len(texts) > 10_000
    words = find_words(pa.array(texts))
    assert words.hashes.tolist() == [hash_word(unicodedata.normalize("NFC", text.casefold())) for text in texts]


def test_planes_left_out_of_the_tables_hold_nothing() -> None:
    for first, last in itertools.pairwise(words_module._ASSIGNED):
        assert {unicodedata.category(chr(code)) for code in range(first[1], last[0])} <= {"Cn", "Co", "Cs"}
    rest = range(words_module._ASSIGNED[-1][1], 0x110000)
    assert {unicodedata.category(chr(code)) for code in rest} <= {"Cn", "Co"}


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
        ("GROẞE Straße", ["grosse", "strasse"]),
        ("❤\ufe0fabc", ["abc"]),
        ("| - | - |", ["|", "-", "|", "-", "|"]),
        (" \n\u3000", []),
    ],
)
def test_words_are_those_a_reader_expects(text: str, words: list[str]) -> None:
    assert list_words(text) == words
    assert unpack(find_words(pa.array([text]))) == [[(hash_word(word), len(word)) for word in words]]


def test_hash_of_a_word_never_changes() -> None:
    words = find_words(pa.array(["Memory 显 भाषा", "-"]))
    assert [f"{value:016x}" for value in words.hashes.tolist()] == GOLDEN_HASHES
    assert words.num_chars.tolist() == [6, 1, 4, 1]


@given(st.lists(mixed_texts, max_size=8), st.integers(1, 60))
def test_tiles_give_the_same_words(texts: list[str], tile_bytes: int) -> None:
    found: list[list[tuple[int, int]]] = []
    for first, words in iterate_words(pa.array(texts, pa.string()), tile_bytes):
        assert first == len(found)
        found.extend(unpack(words))
    assert found == expect_words(texts)


def test_a_tile_is_no_larger_than_asked_but_for_one_text() -> None:
    texts = [topics[name] for name in sorted(topics)]
    sizes = [len(text.encode()) for text in texts]
    starts = [first for first, _ in iterate_words(pa.array(texts), 20_000)]
    tiles = [sizes[start:end] for start, end in itertools.pairwise([*starts, len(texts)])]
    assert max(sizes) > 20_000 > min(sizes)
    assert all(sum(tile) <= 20_000 or len(tile) == 1 for tile in tiles)
    assert all(sum(tile) + following[0] > 20_000 for tile, following in itertools.pairwise(tiles))


def test_arrays_of_every_kind_are_the_same_texts() -> None:
    texts = [*PIECES, "", "x" * 300, "é"]
    expected = expect_words(texts[2:])
    array = pa.array(texts)
    large = array.cast(pa.large_string())
    for given_texts in (
        array[2:],
        large[2:],
        pa.chunked_array([array[2:5], array[5:5], array[5:]]),
        pa.chunked_array([large[2:9], large[9:]]),
        pa.table({"text": large})["text"].slice(2),
    ):
        assert unpack(find_words(given_texts)) == expected
    assert unpack(find_words(array[4:7])) == expected[2:5]


def test_null_counts_as_blank_and_nothing_gives_nothing() -> None:
    assert unpack(find_words(pa.array(["a", None, "b"])[1:])) == [[], [(hash_word("b"), 1)]]
    assert unpack(find_words(pa.array([None, None], pa.string()))) == [[], []]
    hidden = pa.Array.from_buffers(pa.string(), 2, [pa.py_buffer(b"\2"), *pa.array(["a", "b"]).buffers()[1:]])
    assert hidden.to_pylist() == [None, "b"]
    assert unpack(find_words(hidden)) == [[], [(hash_word("b"), 1)]]
    for nothing in (pa.array([], pa.string()), pa.chunked_array([], pa.string()), pa.array(["a"])[1:]):
        assert unpack(find_words(nothing)) == []


def test_a_text_that_folding_makes_longer_keeps_the_words_before_it() -> None:
    texts = ["one two", "\U0001d160" * 1000, "three", "ŉ ΐ " * 500, "four"]
    assert len(unicodedata.normalize("NFC", texts[1]).encode()) > sum(len(text.encode()) for text in texts)
    assert unpack(find_words(pa.array(texts))) == expect_words(texts)


@given(st.lists(st.binary(max_size=12), min_size=1, max_size=6))
def test_bytes_that_are_not_utf8_do_no_harm_to_other_texts(parts: list[bytes]) -> None:
    # The last text ends with the buffer, and with half a character if its bytes do.
    rows = [b"before", *parts, b"after", parts[-1] + b"\xf0"]
    bounds = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    array = pa.Array.from_buffers(
        pa.large_string(), len(rows), [None, pa.py_buffer(bounds.tobytes()), pa.py_buffer(b"".join(rows))]
    )
    found = unpack(find_words(array))
    assert found == [unpack(find_words(array[row : row + 1]))[0] for row in range(len(rows))]
    assert found[1:-2] == [
        unpack(find_words(pa.array([part]).cast(pa.binary()).view(pa.string())))[0] for part in parts
    ]
    assert found[0] == [(hash_word("before"), 6)]
    assert found[-2] == [(hash_word("after"), 5)]


@pytest.mark.parametrize("character", ["é", "中", "𠀀"])
def test_half_a_character_does_not_take_bytes_of_the_next_text(character: str) -> None:
    encoded = character.encode()
    rows = [row for size in range(1, len(encoded)) for row in (b"a" + encoded[:size], b"b")]
    bounds = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    buffers = [None, pa.py_buffer(bounds.tobytes()), pa.py_buffer(b"".join(rows))]
    found = unpack(find_words(pa.Array.from_buffers(pa.large_string(), len(rows), buffers)))
    assert found == [[(hash_word("a"), 1)], [(hash_word("b"), 1)]] * (len(encoded) - 1)


def test_only_strings_are_texts() -> None:
    for wrong in (pa.array([1]), pa.array([b"a"]), pa.chunked_array([], pa.int64())):
        with pytest.raises(InputError, match="must be strings"):
            find_words(wrong)


def test_a_frozen_array_is_a_read_only_view_of_the_same_memory() -> None:
    array = np.arange(10, dtype=np.uint64)
    frozen = freeze_array(array)
    assert np.shares_memory(frozen, array)
    assert not frozen.flags.writeable
    assert array.flags.writeable
    assert freeze_array(array[::2]).flags.c_contiguous
