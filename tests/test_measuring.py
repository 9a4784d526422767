"""Measures of texts against a slow reference in plain Python, on made-up and on real texts of many scripts."""

import itertools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.measuring import MEASURES, STOP_WORDS, compute_measures
from pipelines.python_docs import iterate_python_docs
from pipelines.scanning import BULLETS, CLOSING_MARKS, SENTENCE_MARKS, WIDE_SENTENCE_MARKS
from pipelines.words import SPACELESS_SCRIPTS
from tests.corpora import CHINESE

THAI = "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ "
HINDI = "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। "

PIECES = [
    *(
        "word",
        "Straße",
        "ΣΊΣΥΦΟΣ",
        "don't",
        "snake_case",
        "3.14",
        "x²",
        "①",
        "ﬁn",
        "ǅ",
        "the",
        "that",
        "AND",
        "#",
        "##",
    ),
    *(
        "中文没有空格",
        "〇々",
        "𠀀",
        "ひらがな",
        "か\u3099",
        "한국어 낱말",
        "\u1112\u1161\u11ab",
        "ไม่มีช่องว่าง",
        "हिन्दी में",
        "क्\u200dष",
        "e\u0301",
    ),
    *("❤\ufe0f", "1\ufe0f\u20e3", "\u0301", "\u200d", "👩\u200d💻", "\ufeff", "\0", "İstanbul"),
    *(" ", "  ", "\n", "\n\n", "\n \n", "\r\n", "\t", "\u3000", "\u2028", "\x85"),
    *(".", "...", "....", "…", "!", "?!", "。", "！」", ".)", '."', "।", "؟", "-", "* ", "• ", "{", "}"),
    *(
        "Lorem ipsum",
        "lorem  ipsum",
        "JavaScript",
        "javascript",
        "java script",
        "a b a b a b a b a b a b a b a b a b a b a b",
    ),
    *("line one\nline two\nline one\nline two\n\nline one\nline two\n", "中华人民共和国中华人民共和国中华人民共和国"),
]

texts_strategy = st.lists(
    st.one_of(st.sampled_from(PIECES), st.text(st.characters(codec="utf-8"), max_size=5)), max_size=40
).map("".join)

MIXED = (
    "Lorem ipsum ... { the end of that\n- Javascript # and more ...\n- Javascript # and more ...\n\n"
    "- Javascript # and more ...\n\n- Javascript # and more ...\n\n"
    "one two three four five six seven eight nine ten eleven. One two three four five six seven eight nine ten eleven. "
    "7"
)
"""A text of which no measure is 0."""


def is_spaceless(char: str) -> bool:
    category = unicodedata.category(char)
    in_script = any(first <= ord(char) <= last for first, last in SPACELESS_SCRIPTS)
    return in_script and (category[0] == "L" or category == "Nl")


def is_mark(char: str) -> bool:
    return unicodedata.category(char)[0] == "M" or char in "\u200c\u200d"


def split_words(text: str) -> list[str]:
    words: list[str] = []
    state = ""
    for char in text:
        if is_mark(char):
            if state:
                words[-1] += char
        elif is_spaceless(char):
            words.append(char)
            state = "alone"
        elif unicodedata.category(char)[0] in "LN" or char == "_":
            if state == "spaced":
                words[-1] += char
            else:
                words.append(char)
            state = "spaced"
        else:
            state = ""
    return words


def lower_ascii(text: str) -> str:
    return re.sub("[A-Z]+", lambda match: match[0].lower(), text)


def count_sentences(text: str) -> int:
    marks = re.escape(SENTENCE_MARKS + WIDE_SENTENCE_MARKS)
    closing = re.escape(CLOSING_MARKS)
    num_sentences = 0
    for match in re.finditer(f"[{marks}][{marks}{closing}]*", text):
        is_wide = not set(WIDE_SENTENCE_MARKS).isdisjoint(match[0])
        num_sentences += int(is_wide or match.end() == len(text) or text[match.end()].isspace())
    return num_sentences


def measure_repeated(items: Sequence[Any], lengths: Sequence[int]) -> tuple[float, int]:
    seen = set()
    num_repeated = num_chars = 0
    for item, length in zip(items, lengths, strict=True):
        if item in seen:
            num_repeated += 1
            num_chars += length
        seen.add(item)
    return divide(num_repeated, len(items)), num_chars


def divide(count: float, total: float) -> float:
    return count / total if total else 0.0


def iterate_windows(words: Sequence[str], size: int) -> Iterator[tuple[int, tuple[str, ...]]]:
    for start in range(len(words) - size + 1):
        yield start, tuple(words[start : start + size])


def measure_top(words: Sequence[str], size: int) -> float:
    counts = Counter(window for _, window in iterate_windows(words, size))
    best = max(((count, len("".join(window))) for window, count in counts.items() if count > 1), default=(0, 0))
    return min(1.0, divide(best[0] * best[1], len("".join(words))))


def measure_duplicates(words: Sequence[str], size: int) -> float:
    seen: set[tuple[str, ...]] = set()
    covered: set[int] = set()
    for start, window in iterate_windows(words, size):
        if window in seen:
            covered.update(range(start, start + size))
        seen.add(window)
    return divide(sum(len(words[place]) for place in covered), len("".join(words)))


def measure_slowly(text: str) -> dict[str, float]:
    folded = unicodedata.normalize("NFC", text.casefold())
    words = split_words(folded) or [char for char in folded if not char.isspace()]
    written = split_words(text)
    spaceless = [word for word in written if is_spaceless(word[0])]
    spaced = [word for word in written if not is_spaceless(word[0])]
    characters = [char for char in text if not char.isspace()]
    num_letters = sum(unicodedata.category(char)[0] == "L" for char in text)
    num_letters += sum(is_mark(char) for char in "".join(written))
    pieces = text.split()
    lines = [line.strip() for line in text.split("\n")]
    paragraphs = [tuple(group) for is_text, group in itertools.groupby(lines, bool) if is_text]
    lines = [line for line in lines if line]
    line_share, line_chars = measure_repeated(lines, list(map(len, lines)))
    lengths = [sum(map(len, paragraph)) for paragraph in paragraphs]
    paragraph_share, paragraph_chars = measure_repeated(paragraphs, lengths)
    stride = 2 if len(spaceless) > len(spaced) else 1
    has_length = spaced and stride == 1
    return {
        "words": len(words),
        "mean_word_chars": len("".join(spaced)) / len(spaced) if has_length else math.nan,
        "non_alphabetic_share": divide(len(characters) - num_letters, len(characters)),
        "alphabetic_piece_share": divide(
            sum(any(unicodedata.category(char)[0] == "L" for char in piece) for piece in pieces), len(pieces)
        ),
        "distinct_word_share": divide(len(set(words)), len(words)),
        "entropy_bits": sum(
            -count / len(words) * math.log2(count / len(words))
            for count in Counter(words).values()
            if len(set(words)) > 1
        ),
        "hashes_per_word": divide(text.count("#"), len(words)),
        "ellipses_per_word": divide(text.count("...") + text.count("…"), len(words)),
        "bullet_line_share": divide(sum(line[0] in BULLETS for line in lines), len(lines)),
        "ellipsis_line_share": divide(sum(line.endswith(("...", "…")) for line in lines), len(lines)),
        "stop_words": len(set(words) & set(STOP_WORDS)),
        "sentences": count_sentences(text),
        "lines": len(lines),
        "lorem_ipsum": lower_ascii(text).count("lorem ipsum"),
        "curly_brackets": text.count("{"),
        "javascript_line_share": divide(sum("javascript" in lower_ascii(line) for line in lines), len(lines)),
        "duplicate_line_share": line_share,
        "duplicate_line_char_share": divide(line_chars, sum(map(len, lines))),
        "duplicate_paragraph_share": paragraph_share,
        "duplicate_paragraph_char_share": divide(paragraph_chars, sum(map(len, lines))),
        **{f"top_{n}gram_char_share": measure_top(words, n * stride) for n in (2, 3, 4)},
        **{f"duplicate_{n}gram_char_share": measure_duplicates(words, n * stride) for n in (5, 6, 7, 8, 9, 10)},
    }


def assert_measures(texts: list[str]) -> None:
    measures = compute_measures(pa.array(texts, pa.string()), MEASURES)
    assert set(measures) == set(MEASURES)
    for row, text in enumerate(texts):
        expected = measure_slowly(text)
        for name, values in measures.items():
            assert values[row] == pytest.approx(expected[name], rel=1e-12, abs=1e-12, nan_ok=True), (name, text)


@settings(max_examples=100)
@given(st.lists(texts_strategy, max_size=6))
def test_measures_are_those_of_the_reference(texts: list[str]) -> None:
    assert_measures(texts)


@settings(max_examples=80)
@given(st.lists(st.sampled_from(["a", "bb", "一", "二", "ก", "é"]), max_size=120), st.sampled_from(["", " ", ". "]))
def test_ngrams_of_texts_that_repeat_themselves_are_those_of_the_reference(words: list[str], joiner: str) -> None:
    assert_measures([joiner.join(words)])


def test_measures_of_real_texts_are_those_of_the_reference() -> None:
    real = [document["text"] for document in itertools.islice(iterate_python_docs(), 0, None, 15)]
    assert_measures([*real, CHINESE, THAI * 9, HINDI * 9, MIXED])


def test_measures_do_not_depend_on_the_batch() -> None:
    texts = [text for name, text in sorted(topics.items()) if len(text) < 60_000]
    texts = [*texts, CHINESE, THAI, HINDI, "", "\n", MIXED]
    whole = compute_measures(pa.array(texts), MEASURES)
    assert sum(map(len, texts)) > 1 << 18  # more than one tile of words
    sliced = pa.array(["other", *texts[:9], "other"])[1:10]
    chunks = pa.chunked_array([texts[:4], texts[4:9]])
    for same in (sliced, chunks, pa.array(texts[:9], pa.large_string())):
        part = compute_measures(same, MEASURES)
        assert all(np.array_equal(part[name], values[:9], equal_nan=True) for name, values in whole.items())
    for row in range(0, len(texts), 7):
        alone = compute_measures(pa.array(texts[row : row + 1]), MEASURES)
        assert all(np.array_equal(alone[name], values[[row]], equal_nan=True) for name, values in whole.items())
    backwards = compute_measures(pa.array(texts[::-1]), MEASURES)
    assert all(np.array_equal(backwards[name][::-1], values, equal_nan=True) for name, values in whole.items())


def test_measures_of_no_texts() -> None:
    assert all(len(values) == 0 for values in compute_measures(pa.array([], pa.string()), MEASURES).values())


def test_a_few_measures_by_hand() -> None:
    text = "To be or not to be.\n\n* To be or not to be.\n"
    values = {name: measured[0] for name, measured in compute_measures(pa.array([text]), MEASURES).items()}
    assert values["words"] == 12
    assert values["mean_word_chars"] == 26 / 12
    assert values["distinct_word_share"] == 4 / 12
    assert values["bullet_line_share"] == 0.5
    assert values["sentences"] == 2
    assert values["top_2gram_char_share"] == 4 * 4 / 26  # "to be", four times
    assert values["duplicate_5gram_char_share"] == 13 / 26  # the second sentence
    assert values["duplicate_line_share"] == 0  # the bullet makes the lines different


def test_letters_of_scripts_without_spaces_count_in_pairs() -> None:
    chinese = "天地玄黄宇宙洪荒日月" + "盈昃" + "天地玄黄宇宙洪荒日月"
    values = compute_measures(pa.array([chinese]), MEASURES)
    assert values["words"].tolist() == [22]
    assert values["duplicate_5gram_char_share"].tolist() == [10 / 22]
    assert values["duplicate_6gram_char_share"].tolist() == [0]
    assert np.isnan(values["mean_word_chars"]).all()
